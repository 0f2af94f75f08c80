// SPDX-License-Identifier: MIT
// Which blocks a key head visits: estimates of their mass from the summaries, as `lite_attention/reference.py`, `estimate`,
// by matrix products over 16 blocks and 8 query heads. Which channel stands where in a product is free as long as both sides
// agree, so a thread loads 8 channels at a time and none has to be moved.
#pragma once

#include "config.h"

namespace lite_attention::sm90 {

// d += a * b for 16 x 16 and 16 x 8 matrices.
CUTLASS_DEVICE void mma(float (&d)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1, __half) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
CUTLASS_DEVICE void mma(float (&d)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

CUTLASS_DEVICE uint32_t bits(__half2 pair) { return reinterpret_cast<uint32_t const&>(pair); }
CUTLASS_DEVICE __half2 halves(uint32_t pair) { return reinterpret_cast<__half2 const&>(pair); }

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
    uint32_t linear[kParts][4];
    uint32_t square[kParts][4];
    float largest;  // of the head that this thread holds: lane / 4

    // `query`: the first head; heads from `heads` on are zero.
    CUTLASS_DEVICE void load(typename Config::Element const* query, int64_t head_stride, int heads, int head_dim) {
        int const lane = threadIdx.x % kWarp;
        int const head = lane / 4;
        uint4 raw[kParts];
        CUTLASS_PRAGMA_UNROLL
        for (int part = 0; part < kParts; ++part) {
            int const channel = part * 32 + lane % 4 * 8;
            bool const exists = head < heads && channel < head_dim;
            raw[part] = exists ? *reinterpret_cast<uint4 const*>(query + head * head_stride + channel) : uint4{};
        }
        largest = 0.0f;
        for_each(raw, [&](int, int, float2 pair) { largest = fmaxf(largest, fmaxf(fabsf(pair.x), fabsf(pair.y))); });
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
        float const inverse = largest > 0.0f ? 1.0f / largest : 0.0f;
        for_each(raw, [&](int part, int i, float2 pair) {
            float2 const unit{pair.x * inverse, pair.y * inverse};
            linear[part][i] = bits(__float22half2_rn(unit));
            square[part][i] = bits(__float22half2_rn({unit.x * unit.x, unit.y * unit.y}));
        });
    }

private:
    template <class Action>
    CUTLASS_DEVICE static void for_each(uint4 const (&raw)[kParts], Action action) {
        using Pair = std::conditional_t<std::is_same_v<typename Config::Element, __half>, __half2, __nv_bfloat162>;
        CUTLASS_PRAGMA_UNROLL
        for (int part = 0; part < kParts; ++part) {
            uint32_t const words[4] = {raw[part].x, raw[part].y, raw[part].z, raw[part].w};
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < 4; ++i) {
                Pair const pair = reinterpret_cast<Pair const&>(words[i]);
                if constexpr (std::is_same_v<Pair, __half2>) {
                    action(part, i, __half22float2(pair));
                } else {
                    action(part, i, __bfloat1622float2(pair));
                }
            }
        }
    }
};

// Scores 32 blocks for eight query heads; bit i of the result: some head expects more of block i than the threshold.
// Called by a whole warp; the result is every lane's.
//
//   summary   where this lane's block has its summary
//   limit     threshold + LSE of the step before, in log2 units, of heads 2 * (lane % 4) and the one after; +inf: no such head
template <class Config>
CUTLASS_DEVICE uint32_t score(
    ScoringQuery<Config> const& query, uint8_t const* summary, int head_dim, float scale_log2, float2 limit) {
    constexpr int kParts = ScoringQuery<Config>::kParts;
    int const lane = threadIdx.x % kWarp;
    // The heads of this thread's sums are not those of its operands.
    float2 const largest{
        __shfl_sync(~0u, query.largest, lane % 4 * 8), __shfl_sync(~0u, query.largest, lane % 4 * 8 + 4)};
    float2 const linear{largest.x * scale_log2, largest.y * scale_log2};
    float2 const square{0.5f * kLn2 * linear.x * linear.x, 0.5f * kLn2 * linear.y * linear.y};
    constexpr float kLogBlock = 4.0f;
    static_assert(kDecodeBlock == 16);

    uint32_t word = 0;
    CUTLASS_PRAGMA_UNROLL
    for (int tile = 0; tile < 2; ++tile) {
        uint2 mean[2][kParts];
        uint2 deviation[2][kParts];
        float2 scales[2];
        CUTLASS_PRAGMA_UNROLL
        for (int half = 0; half < 2; ++half) {
            auto const* const from = reinterpret_cast<uint8_t const*>(__shfl_sync(
                ~0u, reinterpret_cast<unsigned long long>(summary), tile * 16 + half * 8 + lane / 4));
            CUTLASS_PRAGMA_UNROLL
            for (int part = 0; part < kParts; ++part) {
                int const channel = part * 32 + lane % 4 * 8;
                bool const exists = channel < head_dim;
                mean[half][part] = exists ? __ldg(reinterpret_cast<uint2 const*>(from + channel)) : uint2{};
                deviation[half][part] = exists ? __ldg(reinterpret_cast<uint2 const*>(from + head_dim + channel)) : uint2{};
            }
            scales[half] = __ldg(reinterpret_cast<float2 const*>(from + 2 * head_dim));
        }
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
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < 4; i += 2) {
                uint32_t const a_mean[4] = {bits(m[0][i]), bits(m[1][i]), bits(m[0][i + 1]), bits(m[1][i + 1])};
                uint32_t const a_deviation[4] = {bits(d[0][i]), bits(d[1][i]), bits(d[0][i + 1]), bits(d[1][i + 1])};
                mma(of_mean, a_mean, query.linear[part][i], query.linear[part][i + 1], __half{});
                mma(of_deviation, a_deviation, query.square[part][i], query.square[part][i + 1], __half{});
            }
        }
        CUTLASS_PRAGMA_UNROLL
        for (int half = 0; half < 2; ++half) {
            float2 const scale = scales[half];
            float const variance = scale.y * scale.y;
            bool const passes =
                kLogBlock + linear.x * scale.x * of_mean[2 * half] + square.x * variance * of_deviation[2 * half] > limit.x ||
                kLogBlock + linear.y * scale.x * of_mean[2 * half + 1] + square.y * variance * of_deviation[2 * half + 1] >
                    limit.y;
            // Lanes 4 i to 4 i + 3 speak for block i: their bits become one.
            uint32_t votes = __ballot_sync(~0u, passes);
            votes = (votes | votes >> 1 | votes >> 2 | votes >> 3) & 0x11111111u;
            votes = (votes | votes >> 3) & 0x03030303u;
            votes = (votes | votes >> 6) & 0x000f000fu;
            votes = (votes | votes >> 12) & 0xffu;
            word |= votes << (tile * 16 + half * 8);
        }
    }
    return word;
}

}  // namespace lite_attention::sm90
