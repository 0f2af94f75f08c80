// SPDX-License-Identifier: MIT
// Online softmax of the two query rows that a consumer thread holds, and the skip rules, which look at the same numbers.
// Numbers: the FlashAttention-3 paper (section 3) for the order of work; `lite_attention/reference.py` for the rules.
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

// The four lanes of a quad hold one row.
CUTLASS_DEVICE float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
CUTLASS_DEVICE float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
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

    // Before a row of the mask. `lse_before`: natural LSE of the two queries in the step before (rule `mass`). Queries past
    // the end (not `valid`) agree to everything.
    CUTLASS_DEVICE void begin(float threshold, bool const (&valid)[2], float const (&lse_before)[2]) {
        CUTLASS_PRAGMA_UNROLL
        for (int r = 0; r < 2; ++r) {
            base_[r] = -INFINITY;
            sum_[r] = 0.0f;
            if constexpr (kTracking == Tracking::kRunningMax) {
                max_[r] = -INFINITY;
                limit_[r] = valid[r] ? threshold : INFINITY;
            }
            if constexpr (kTracking == Tracking::kMass) {
                // No step before: NaN, to which no comparison agrees.
                float const known = lse_before[r] == INFINITY ? NAN : threshold + lse_before[r] * kLog2E;
                limit_[r] = valid[r] ? known : INFINITY;
            }
        }
    }

    // Turns scores into weights relative to the rows' bases. `rescale` is what earlier weights are to be multiplied by.
    // Returns, for each block, whether all of this thread's rows agree to clear it.
    template <class Scores>
    CUTLASS_DEVICE void step(Scores& scores, float (&rescale)[2], bool (&agree)[kBlocks]) {
        float block_max[kBlocks][2];
        CUTLASS_PRAGMA_UNROLL
        for (int b = 0; b < kBlocks; ++b) {
            CUTLASS_PRAGMA_UNROLL
            for (int r = 0; r < 2; ++r) {
                float largest = scores(at(b, 0, r, 0));
                CUTLASS_PRAGMA_UNROLL
                for (int i = 1; i < 16; ++i) { largest = fmaxf(largest, scores(at(b, i / 2, r, i % 2))); }
                block_max[b][r] = largest;
            }
        }
        float largest[2];
        CUTLASS_PRAGMA_UNROLL
        for (int r = 0; r < 2; ++r) {
            if constexpr (kTracking == Tracking::kRunningMax) {
                // -inf in the block means no say: NaN or -inf here, neither above the limit.
                CUTLASS_PRAGMA_UNROLL
                for (int b = 0; b < kBlocks; ++b) {
                    bool const agrees = !((block_max[b][r] - max_[r]) * scale_log2_ > limit_[r]);
                    agree[b] = r == 0 ? agrees : agree[b] && agrees;
                    max_[r] = fmaxf(max_[r], quad_max(block_max[b][r]));
                }
                largest[r] = max_[r];
            } else {
                largest[r] = block_max[0][r];
                CUTLASS_PRAGMA_UNROLL
                for (int b = 1; b < kBlocks; ++b) { largest[r] = fmaxf(largest[r], block_max[b][r]); }
                largest[r] = quad_max(largest[r]);
            }
        }
        CUTLASS_PRAGMA_UNROLL
        for (int r = 0; r < 2; ++r) {
            bool const grown = (largest[r] - base_[r]) * scale_log2_ > kSlack;
            float const base = grown ? largest[r] : base_[r];
            rescale[r] = grown ? exp2f((base_[r] - base) * scale_log2_) : 1.0f;
            base_[r] = base;
            float const offset = base == -INFINITY ? 0.0f : base * scale_log2_;
            sum_[r] *= rescale[r];
            float block_sum[kBlocks];
            CUTLASS_PRAGMA_UNROLL
            for (int b = 0; b < kBlocks; ++b) {
                block_sum[b] = 0.0f;
                CUTLASS_PRAGMA_UNROLL
                for (int i = 0; i < 16; ++i) {
                    float& score = scores(at(b, i / 2, r, i % 2));
                    score = exp2f(score * scale_log2_ - offset);
                    block_sum[b] += score;
                }
            }
            CUTLASS_PRAGMA_UNROLL
            for (int b = 0; b < kBlocks; ++b) {
                sum_[r] += block_sum[b];
                if constexpr (kTracking == Tracking::kRunningMax) {
                    // A NaN stays in the sum: from then on the row keeps everything.
                    agree[b] = agree[b] && sum_[r] == sum_[r];
                }
                if constexpr (kTracking == Tracking::kMass) {
                    bool const agrees = quad_sum(block_sum[b]) <= exp2f(limit_[r] - offset);
                    agree[b] = r == 0 ? agrees : agree[b] && agrees;
                }
            }
        }
    }

    // After a row of the mask: the factor of the output rows and their natural LSE.
    CUTLASS_DEVICE void end(float (&factor)[2], float (&lse)[2]) {
        CUTLASS_PRAGMA_UNROLL
        for (int r = 0; r < 2; ++r) {
            float const sum = quad_sum(sum_[r]);
            factor[r] = sum == 0.0f ? 0.0f : 1.0f / sum;
            lse[r] = sum == 0.0f ? -INFINITY : base_[r] * scale_log2_ * kLn2 + logf(sum);
        }
    }

  private:
    CUTLASS_DEVICE static constexpr int at(int block, int group, int row, int column) {
        return column + 2 * row + 4 * (8 * block + group);
    }

    float scale_log2_;
    float base_[2];   // raw scores
    float max_[2];    // raw scores, of all blocks before
    float sum_[2];    // of this thread's columns
    float limit_[2];  // of the rule, log2 units
};

}  // namespace lite_attention::sm90
