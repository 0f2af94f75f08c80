// SPDX-License-Identifier: MIT
// What blocks weigh, estimated from their summaries as `lite_attention/reference.py`, `estimate`, or exactly: matrix products over
// 16 blocks or keys and 8 query heads. Which channel stands where in a product is free as long as both sides agree, so a thread
// loads 8 channels at a time and none has to be moved.
#pragma once

#include "mma.h"
#include "work.h"

namespace lite_attention::sm90 {

// The bits of `mask` of both halves of a word, as halves of 1024 + number: these are 0x6400 + number.
CUTLASS_DEVICE __half2 widen(uint32_t word, uint32_t mask) { return halves(and_or(word, mask | mask << 16, 0x64006400u)); }

CUTLASS_DEVICE __half2 signed_square(__half2 n) { return __hmul2(n, __habs2(n)); }

// What a thread holds of eight query heads as the second operands of the products: q, and q squared, of its eight channels of every
// 32. Each head is divided by its largest magnitude, so that half precision neither overflows nor loses what counts.
template <class Config>
struct ScoringQuery {
    static constexpr int kParts = Config::kHeadDim / 32;
    uint4 linear[kParts];
    uint4 square[kParts];
    float largest[2];  // of the heads lane % 4 * 2 and the next

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
            linear[part] = {of_linear[0], of_linear[1], of_linear[2], of_linear[3]};
            square[part] = {of_square[0], of_square[1], of_square[2], of_square[3]};
        }
        CUTLASS_PRAGMA_UNROLL
        for (int h = 0; h < 2; ++h) { largest[h] = __shfl_sync(~0u, of_head, (lane % 4 * 2 + h) * 4); }
    }
};

// What summaries say of this thread's two blocks and two heads, in the order of the products' results.
struct Moments {
    float outlier[4];   // its score
    float mean[4];      // log2 of the mass of the other keys if all scores were their mean
    float variance[4];  // of their scores, in squared log2 units
};

// The summaries of kTileBlocks blocks, in shared memory, as the first operands: a thread holds eight channels of every 32 of two
// blocks, lane / 4 and the one 8 further. `lite_attention/reference.py`, `summarize`, says which bits are what.
template <class Config>
struct SummaryTile {
    uint8_t const* first;
    int row_bytes;  // from one to the next

    // Channels that do not exist are what stands behind, in the same stage: the query has zeros there.
    CUTLASS_DEVICE Moments moments(ScoringQuery<Config> const& query, float scale_log2, int head_dim) const {
        int const lane = threadIdx.x % kWarp;
        uint8_t const* const of_block[2] = {first + lane / 4 * row_bytes, first + (lane / 4 + 8) * row_bytes};
        float of_outlier[4] = {};
        float of_mean[4] = {};
        float of_deviation[4] = {};
        CUTLASS_PRAGMA_UNROLL
        for (int part = 0; part < Config::kHeadDim / 32; ++part) {
            uint4 words[2];
            CUTLASS_PRAGMA_UNROLL
            for (int half = 0; half < 2; ++half) {
                words[half] = *reinterpret_cast<uint4 const*>(of_block[half] + 2 * (part * 32 + lane % 4 * 8));
            }
            // `read` makes halves of a word: the first operand.
            auto multiply = [&](float (&result)[4], uint4 const& operand, auto read) {
                uint32_t const low[4] = {read(words[0].x), read(words[1].x), read(words[0].y), read(words[1].y)};
                uint32_t const high[4] = {read(words[0].z), read(words[1].z), read(words[0].w), read(words[1].w)};
                mma(result, low, operand.x, operand.y, __half{});
                mma(result, high, operand.z, operand.w, __half{});
            };
            multiply(of_mean, query.linear[part], [](uint32_t word) {
                return bits(signed_square(__hsub2(widen(word, 0x7F), __float2half2_rn(1024.0f + 64.0f))));
            });
            multiply(of_deviation, query.square[part], [](uint32_t word) {
                __half2 const deviation = __hsub2(widen(word >> 7, 0xF), __float2half2_rn(1024.0f));
                return bits(__hmul2(deviation, deviation));
            });
            multiply(of_outlier, query.linear[part], [](uint32_t word) {
                __half2 const sixteenfold = widen(word >> 7, 0x1F0);
                return bits(signed_square(
                    __hfma2(sixteenfold, __float2half2_rn(1.0f / 16.0f), __float2half2_rn(-1024.0f / 16.0f - 16.0f))));
            });
        }
        static_assert(kDecodeBlock - 1 == 15);
        constexpr float kLogOthers = 3.9068905956085187f;  // log2
        Moments moments;
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 4; ++i) {
            float4 const scales = *reinterpret_cast<float4 const*>(of_block[i / 2] + 2 * head_dim);
            float const of_head = query.largest[i % 2] * scale_log2;
            moments.outlier[i] = of_head * scales.x * of_outlier[i];
            moments.mean[i] = kLogOthers + of_head * scales.y * of_mean[i];
            float const deviation = of_head * scales.z;
            moments.variance[i] = deviation * deviation * of_deviation[i];
        }
        return moments;
    }
};

// How much the spread of a block's scores adds to the log2 of its mass. `variance`: of the scores, in squared log2 units.
CUTLASS_DEVICE float spread(float variance, float bend) {
    return (sqrtf(1.0f + variance * (1.0f / (kLog2E * kLog2E * bend))) - 1.0f) * (bend * kLog2E);
}

// log2(2^a + 2^b) of finite numbers.
CUTLASS_DEVICE float log2_of_sum(float a, float b) {
    float const difference = a - b;
    return fmaxf(a, b) + log2f(1.0f + exp2f(fminf(difference, -difference)));  // -fabsf() takes two instructions
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
