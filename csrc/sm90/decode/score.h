// SPDX-License-Identifier: MIT
// What blocks weigh, estimated from their summaries as `lite_attention/reference.py`, `estimate`, or exactly: matrix products over
// 16 blocks or keys and 8 query heads. Which channel stands where in a product is free as long as both sides agree, so a thread
// loads 8 channels at a time and none has to be moved.
#pragma once

#include "mma.h"
#include "work.h"

namespace lite_attention::sm90 {

// Four bytes as halves of 1024 + byte, two of them in each result: 1024 + n is 0x6400 + n.
CUTLASS_DEVICE void widen(uint32_t bytes, __half2& low, __half2& high) {
    low = halves(__byte_perm(bytes, 0x64646464u, 0x4140));
    high = halves(__byte_perm(bytes, 0x64646464u, 0x4342));
}

// Eight query heads as the second operands of the products: q, and q squared, of a thread's eight channels of every 32. Each
// head is divided by its largest magnitude, so that half precision neither overflows nor loses what counts.
template <class Config>
struct ScoringQuery {
    static constexpr int kParts = Config::kHeadDim / 32;
    uint4 linear[kParts][kWarp];
    uint4 square[kParts][kWarp];
    float largest[kHeadTile];

    // Called by a warp. `first_head`: of eight.
    CUTLASS_DEVICE void fill(QueryView<typename Config::Element> const& query, int first_head) {
        using Element = typename Config::Element;
        using Pair = std::conditional_t<std::is_same_v<Element, __half>, __half2, __nv_bfloat162>;
        int const lane = threadIdx.x % kWarp;
        int const head = lane / 4;
        uint4 raw[kParts];
        CUTLASS_PRAGMA_UNROLL
        for (int part = 0; part < kParts; ++part) {
            raw[part] = query.load(first_head + head, part * 32 + lane % 4 * 8);
        }
        float of_head = 0.0f;
        CUTLASS_PRAGMA_UNROLL
        for (int part = 0; part < kParts; ++part) {
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < 4; ++i) {
                float2 const pair = widen(reinterpret_cast<Pair const*>(&raw[part])[i]);
                of_head = fmaxf(of_head, fmaxf(fabsf(pair.x), fabsf(pair.y)));
            }
        }
        of_head = fmaxf(of_head, __shfl_xor_sync(~0u, of_head, 1));
        of_head = fmaxf(of_head, __shfl_xor_sync(~0u, of_head, 2));
        float const inverse = of_head > 0.0f ? 1.0f / of_head : 0.0f;
        CUTLASS_PRAGMA_UNROLL
        for (int part = 0; part < kParts; ++part) {
            uint32_t of_linear[4];
            uint32_t of_square[4];
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < 4; ++i) {
                float2 const pair = widen(reinterpret_cast<Pair const*>(&raw[part])[i]);
                float2 const unit{pair.x * inverse, pair.y * inverse};
                of_linear[i] = bits(__float22half2_rn(unit));
                of_square[i] = bits(__float22half2_rn({unit.x * unit.x, unit.y * unit.y}));
            }
            linear[part][lane] = {of_linear[0], of_linear[1], of_linear[2], of_linear[3]};
            square[part][lane] = {of_square[0], of_square[1], of_square[2], of_square[3]};
        }
        if (lane % 4 == 0) { largest[head] = of_head; }
    }
};

// Eight bytes that the kernel does not write. The compiler keeps it before products that stand behind it, however few registers are
// left: what is asked for early comes while they run.
CUTLASS_DEVICE uint2 load_early(uint8_t const* from) {
    uint2 loaded;
    asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(loaded.x), "=r"(loaded.y) : "l"(from));
    return loaded;
}

// The summaries of 16 blocks as the first operands: a thread holds eight channels of every 32 of two blocks, lane / 4 and the
// one 8 further.
template <class Config>
struct Summaries {
    static constexpr int kParts = Config::kHeadDim / 32;
    uint2 mean[2][kParts];
    uint2 deviation[2][kParts];
    float2 scales[2];

    // `summary`: where each of 16 blocks has its own, in shared memory. Channels that do not exist are those of others: the query
    // has zeros there.
    CUTLASS_DEVICE void load(uint8_t const* const* summary, int head_dim) {
        int const lane = threadIdx.x % kWarp;
        CUTLASS_PRAGMA_UNROLL
        for (int half = 0; half < 2; ++half) {
            uint8_t const* const from = summary[half * 8 + lane / 4];
            CUTLASS_PRAGMA_UNROLL
            for (int part = 0; part < kParts; ++part) {
                int const channel = min(part * 32 + lane % 4 * 8, head_dim - 8);
                mean[half][part] = load_early(from + channel);
                deviation[half][part] = load_early(from + head_dim + channel);
            }
            uint2 const raw = load_early(from + 2 * head_dim);
            scales[half] = {__uint_as_float(raw.x), __uint_as_float(raw.y)};
        }
    }

    // For each of this thread's two blocks and two heads: log2 of the block's mass if all scores were their mean, and the variance
    // of the scores, in squared log2 units.
    CUTLASS_DEVICE void moments(
        ScoringQuery<Config> const& query, float scale_log2, float (&mean_mass)[4], float (&variance)[4]) const {
        int const lane = threadIdx.x % kWarp;
        float of_mean[4] = {};
        float of_deviation[4] = {};
        CUTLASS_PRAGMA_UNROLL
        for (int part = 0; part < kParts; ++part) {
            __half2 m[2][4];
            __half2 d[2][4];
            CUTLASS_PRAGMA_UNROLL
            for (int half = 0; half < 2; ++half) {
                constexpr uint32_t kSigns = 0x80808080u;
                widen(mean[half][part].x ^ kSigns, m[half][0], m[half][1]);
                widen(mean[half][part].y ^ kSigns, m[half][2], m[half][3]);
                widen(deviation[half][part].x, d[half][0], d[half][1]);
                widen(deviation[half][part].y, d[half][2], d[half][3]);
                CUTLASS_PRAGMA_UNROLL
                for (int i = 0; i < 4; ++i) {
                    m[half][i] = __hsub2(m[half][i], __float2half2_rn(1024.0f + 128.0f));
                    d[half][i] = __hsub2(d[half][i], __float2half2_rn(1024.0f));
                    d[half][i] = __hmul2(d[half][i], d[half][i]);
                }
            }
            uint4 const linear = query.linear[part][lane];
            uint4 const square = query.square[part][lane];
            uint32_t const m_low[4] = {bits(m[0][0]), bits(m[1][0]), bits(m[0][1]), bits(m[1][1])};
            uint32_t const m_high[4] = {bits(m[0][2]), bits(m[1][2]), bits(m[0][3]), bits(m[1][3])};
            uint32_t const d_low[4] = {bits(d[0][0]), bits(d[1][0]), bits(d[0][1]), bits(d[1][1])};
            uint32_t const d_high[4] = {bits(d[0][2]), bits(d[1][2]), bits(d[0][3]), bits(d[1][3])};
            mma(of_mean, m_low, linear.x, linear.y, __half{});
            mma(of_deviation, d_low, square.x, square.y, __half{});
            mma(of_mean, m_high, linear.z, linear.w, __half{});
            mma(of_deviation, d_high, square.z, square.w, __half{});
        }
        static_assert(kDecodeBlock == 16);
        constexpr float kLogBlock = 4.0f;
        float2 const linear{
            query.largest[lane % 4 * 2] * scale_log2, query.largest[lane % 4 * 2 + 1] * scale_log2};
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 4; ++i) {
            float const head_scale = i % 2 == 0 ? linear.x : linear.y;
            float const deviation_scale = head_scale * scales[i / 2].y;
            mean_mass[i] = kLogBlock + head_scale * scales[i / 2].x * of_mean[i];
            variance[i] = deviation_scale * deviation_scale * of_deviation[i];
        }
    }
};

// How much the spread of a block's scores adds to the log2 of its mass. `variance`: of the scores, in squared log2 units.
CUTLASS_DEVICE float spread(float variance, float bend) {
    return (sqrtf(1.0f + variance * (1.0f / (kLog2E * kLog2E * bend))) - 1.0f) * (bend * kLog2E);
}

// Log2 of the exact mass of a block for this thread's two heads.
//
//   keys   the block's first, contiguous channels; only the first `count` exist, at least one
//   first_head  of eight
template <class Config>
CUTLASS_DEVICE float2 exact_mass(
    typename Config::Element const* keys, int64_t token_stride, int count, QueryView<typename Config::Element> const& query,
    int first_head, float scale_log2) {
    int const lane = threadIdx.x % kWarp;
    int const key = lane / 4;
    float scores[4] = {};
    CUTLASS_PRAGMA_UNROLL
    for (int part = 0; part < Config::kHeadDim / 32; ++part) {
        int const channel = part * 32 + lane % 4 * 8;
        auto load = [&](int k) {
            bool const exists = k < count && channel < query.head_dim;
            return exists ? *reinterpret_cast<uint4 const*>(keys + k * token_stride + channel) : uint4{};
        };
        uint4 const low = load(key);
        uint4 const high = load(key + 8);
        uint4 const q = query.load(first_head + key, channel);
        uint32_t const first[4] = {low.x, high.x, low.y, high.y};
        uint32_t const second[4] = {low.z, high.z, low.w, high.w};
        mma(scores, first, q.x, q.y, typename Config::Element{});
        mma(scores, second, q.z, q.w, typename Config::Element{});
    }
    float mass[2];
    CUTLASS_PRAGMA_UNROLL
    for (int h = 0; h < 2; ++h) {
        float const low = key < count ? scores[h] * scale_log2 : -INFINITY;
        float const high = key + 8 < count ? scores[h + 2] * scale_log2 : -INFINITY;
        float const largest = join_rows(fmaxf(low, high), fmaxf);
        mass[h] = largest + log2f(join_rows(exp2f(low - largest) + exp2f(high - largest), add));
    }
    return {mass[0], mass[1]};
}

}  // namespace lite_attention::sm90
