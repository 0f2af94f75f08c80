// SPDX-License-Identifier: MIT
// Online softmax of the two query rows that a consumer thread holds, and the skip rules, which look at the same numbers.
// The order of work is that of the FlashAttention-3 paper (section 3); the rules are those of
// `lite_attention/reference.py`. Loops run over independent chains innermost: two warps a scheduler hide no latency.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "config.h"

namespace lite_attention::sm90 {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// A row's exponents are taken relative to `base`, which follows the row's maximum only when that has grown by so many
// log2 units: until then nothing needs to be rescaled, and weights stay below 2^8.
constexpr float kSlack = 8.0f;

// See Softmax::step; above the bits of the blocks.
constexpr uint32_t kGrown = 1 << 7;

// Larger of two numbers, NaN if one is.
CUTLASS_DEVICE float max_nan(float a, float b) {
    float larger;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
    return larger;
}

struct Max {
    CUTLASS_DEVICE float operator()(float a, float b) const { return max_nan(a, b); }
};
struct Sum {
    CUTLASS_DEVICE float operator()(float a, float b) const { return a + b; }
};

// The four lanes of a quad hold parts of the same rows. Joins the parts of two numbers: even lanes get the first, odd lanes
// the second, of half the quad.
template <class Join>
CUTLASS_DEVICE float halve(float first, float second, int lane_bit, Join join) {
    bool const upper = (threadIdx.x & lane_bit) != 0;
    float const mine = upper ? second : first;
    float const theirs = upper ? first : second;
    return join(mine, __shfl_xor_sync(~0u, theirs, lane_bit));
}

CUTLASS_DEVICE uint32_t pack(float low, float high, cutlass::bfloat16_t) {
    __nv_bfloat162 const pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<uint32_t const&>(pair);
}
CUTLASS_DEVICE uint32_t pack(float low, float high, cutlass::half_t) {
    __half2 const pair = __floats2half2_rn(low, high);
    return reinterpret_cast<uint32_t const&>(pair);
}

// Scores come as an accumulator of kBlocks * 32 numbers: column pair c, row r, group of 8 columns j at c + 2 r + 4 j;
// 8 groups make a block.
template <Tracking kTracking, int kBlocks>
class Softmax {
  public:
    CUTLASS_DEVICE Softmax(float scale_log2) : scale_log2_(scale_log2) {}

    // Before a row of the mask. In the rules a lane speaks for one of its quad's rows, the odd lanes for the second:
    // whether that query is `valid` (not past the end) and its natural LSE in the step before (rule `mass`).
    CUTLASS_DEVICE void begin(float threshold, bool valid, float lse_before) {
        CUTLASS_PRAGMA_UNROLL
        for (int r = 0; r < 2; ++r) {
            base_[r] = -INFINITY;
            sum_[r] = 0.0f;
        }
        max_ = -INFINITY;
        limit_ = threshold;
        if constexpr (kTracking == Tracking::kMass) {
            // No step before: NaN, to which no comparison agrees.
            limit_ = lse_before == INFINITY ? NAN : threshold + lse_before * kLog2E;
        }
        if (!valid) { limit_ = INFINITY; }
    }

    // Turns scores into weights relative to the rows' bases. Returns a bit for each block, whether a row of the warp wants to
    // keep it, and kGrown where earlier weights are to be multiplied by `rescale`.
    template <class Scores>
    CUTLASS_DEVICE uint32_t step(Scores& scores, float (&rescale)[2]) {
        float part[kBlocks][2];
        for_all([&](int b, int r) { part[b][r] = scores(at(b, 0, r)); });
        CUTLASS_PRAGMA_UNROLL
        for (int i = 1; i < 16; ++i) {
            for_all([&](int b, int r) { part[b][r] = max_nan(part[b][r], scores(at(b, i, r))); });
        }
        uint32_t keep = 0;
        float own;
        if constexpr (kTracking == Tracking::kRunningMax) {
            own = max_;
            keep = judge(part, Max{}, [&](float block_max, float before) {
                return (block_max - before) * scale_log2_ <= limit_ || block_max == -INFINITY || limit_ == INFINITY;
            }, own);
            max_ = own;
        } else {
            float largest[2] = {part[0][0], part[0][1]};
            CUTLASS_PRAGMA_UNROLL
            for (int b = 1; b < kBlocks; ++b) {
                largest[0] = max_nan(largest[0], part[b][0]);
                largest[1] = max_nan(largest[1], part[b][1]);
            }
            own = halve(largest[0], largest[1], 1, Max{});
            own = max_nan(own, __shfl_xor_sync(~0u, own, 2));
        }
        float const other = __shfl_xor_sync(~0u, own, 1);
        bool const odd = threadIdx.x & 1;
        float const largest[2] = {odd ? other : own, odd ? own : other};

        float offset[2];
        CUTLASS_PRAGMA_UNROLL
        for (int r = 0; r < 2; ++r) {
            // Not "greater": NaN becomes the base.
            bool const same = (largest[r] - base_[r]) * scale_log2_ <= kSlack || largest[r] == -INFINITY;
            float const base = same ? base_[r] : largest[r];
            rescale[r] = same ? 1.0f : exp2f((base_[r] - base) * scale_log2_);
            base_[r] = base;
            offset[r] = base == -INFINITY ? 0.0f : base * scale_log2_;
        }
        for_all([&](int b, int r) { part[b][r] = 0.0f; });
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 16; ++i) {
            for_all([&](int b, int r) {
                float& score = scores(at(b, i, r));
                score = exp2f(score * scale_log2_ - offset[r]);
                part[b][r] += score;
            });
        }
        CUTLASS_PRAGMA_UNROLL
        for (int r = 0; r < 2; ++r) {
            sum_[r] *= rescale[r];
            CUTLASS_PRAGMA_UNROLL
            for (int b = 0; b < kBlocks; ++b) { sum_[r] += part[b][r]; }
        }
        // The sums have a say so that the vote comes after all the exponents, see kernel.h.
        bool const grown = rescale[0] != 1.0f || rescale[1] != 1.0f || !(sum_[0] + sum_[1] >= 0.0f);
        keep |= __any_sync(~0u, grown) ? kGrown : 0u;
        if constexpr (kTracking == Tracking::kMass) {
            float const bound = exp2f(limit_ - (odd ? offset[1] : offset[0]));
            float unused = 0.0f;
            keep |= judge(part, Sum{}, [&](float mass, float) { return mass <= bound || limit_ == INFINITY; }, unused);
        }
        return keep;
    }

    // After a row of the mask: the factor of the output rows and their natural LSE.
    CUTLASS_DEVICE void end(float (&factor)[2], float (&lse)[2]) {
        CUTLASS_PRAGMA_UNROLL
        for (int r = 0; r < 2; ++r) {
            float sum = sum_[r] + __shfl_xor_sync(~0u, sum_[r], 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            factor[r] = sum == 0.0f ? 0.0f : 1.0f / sum;
            lse[r] = sum == 0.0f ? -INFINITY : base_[r] * scale_log2_ * kLn2 + logf(sum);
        }
    }

  private:
    // Place of the i-th of 16 columns that a thread holds of a block.
    CUTLASS_DEVICE static constexpr int at(int block, int i, int row) {
        return i % 2 + 2 * row + 4 * (8 * block + i / 2);
    }

    template <class Body>
    CUTLASS_DEVICE static void for_all(Body body) {
        CUTLASS_PRAGMA_UNROLL
        for (int b = 0; b < kBlocks; ++b) {
            body(b, 0);
            body(b, 1);
        }
    }

    // Joins each block's parts over the quad and asks `agrees(joined, before)` in one lane for each row and block, where
    // `before` joins what came before the block. Adds all blocks to `before`. Bits of the blocks that a row keeps.
    template <class Join, class Agrees>
    CUTLASS_DEVICE static uint32_t judge(float const (&part)[kBlocks][2], Join join, Agrees agrees, float& before) {
        constexpr uint32_t kLowerLanes = 0x33333333;
        bool const upper = threadIdx.x & 2;
        uint32_t keep = 0;
        CUTLASS_PRAGMA_UNROLL
        for (int b = 0; b + 1 < kBlocks; b += 2) {
            // The lower two lanes speak for the first block, the upper two for the second.
            float const mine = halve(
                halve(part[b][0], part[b][1], 1, join), halve(part[b + 1][0], part[b + 1][1], 1, join), 2, join);
            float const theirs = __shfl_xor_sync(~0u, mine, 2);
            uint32_t const against = ~__ballot_sync(~0u, agrees(mine, upper ? join(before, theirs) : before));
            keep |= (against & kLowerLanes ? 1u << b : 0u) | (against & ~kLowerLanes ? 2u << b : 0u);
            before = join(before, join(mine, theirs));
        }
        if constexpr (kBlocks % 2 == 1) {
            constexpr int b = kBlocks - 1;
            float mine = halve(part[b][0], part[b][1], 1, join);
            mine = join(mine, __shfl_xor_sync(~0u, mine, 2));
            keep |= __all_sync(~0u, agrees(mine, before)) ? 0u : 1u << b;
            before = join(before, mine);
        }
        return keep;
    }

    float scale_log2_;
    float base_[2];  // raw scores
    float sum_[2];   // of this thread's columns
    float max_;      // raw score, of the blocks before
    float limit_;    // of the rule, log2 units
};

}  // namespace lite_attention::sm90
