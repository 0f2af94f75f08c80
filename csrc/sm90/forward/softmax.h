// SPDX-License-Identifier: MIT
// Online softmax of the two query rows that a consumer thread holds, and the skip rules, which look at the same numbers.
// The order of work is that of the FlashAttention-3 paper (section 3); the rules are those of
// `lite_attention/reference.py`.
//
// A row's exponents are taken relative to an offset that is its largest score in the first tile, and stays: the weights of
// later tiles may be larger than 1, and only when their sum passes a limit is the largest score looked for again. So most
// tiles need no maximum, and nothing waits for one.
//
// A weight that carries a row is then not the 1 that rounding would leave as it is. In tiles that weigh much more than all
// before, the row's sum takes the weights as rounded, so that what rounding did to them cancels in the quotient.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "config.h"

namespace lite_attention::sm90 {

// Weights below are flushed to zero sooner or later: a rule that compares with less keeps the block.
constexpr float kTiny = 0x1p-100f;

// What the weights of a tile may sum to before the offset is raised: far from overflow.
template <class Element>
constexpr float kLargest = 0x1p40f;
template <>
constexpr float kLargest<cutlass::half_t> = 0x1p15f;

// How many times all before a tile weighs if rounding is made up for. Smaller: more exact, and more often.
constexpr float kHeavy = 8.0f;

// Larger of two numbers, NaN if one is.
struct Max {
    CUTLASS_DEVICE float operator()(float a, float b) const {
        float larger;
        asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
        return larger;
    }
};
struct Sum {
    CUTLASS_DEVICE float operator()(float a, float b) const { return a + b; }
};

// The same for two pairs of bfloat16.
CUTLASS_DEVICE uint32_t larger_pair(uint32_t a, uint32_t b) {
    uint32_t larger;
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
    return larger;
}

// The four lanes of a quad hold parts of the same rows. Joins the parts of two numbers over half the quad: lanes with the bit
// get the second number, the others the first.
template <class Join>
CUTLASS_DEVICE float halve(float first, float second, int lane_bit, Join join) {
    bool const upper = (threadIdx.x & lane_bit) != 0;
    float const mine = upper ? second : first;
    float const theirs = upper ? first : second;
    return join(mine, __shfl_xor_sync(~0u, theirs, lane_bit));
}

// Joins the parts of one number over the quad.
template <class Join>
CUTLASS_DEVICE float join_quad(float part, Join join) {
    part = join(part, __shfl_xor_sync(~0u, part, 1));
    return join(part, __shfl_xor_sync(~0u, part, 2));
}

CUTLASS_DEVICE uint32_t pack(float low, float high, cutlass::bfloat16_t) {
    __nv_bfloat162 const pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<uint32_t const&>(pair);
}
CUTLASS_DEVICE uint32_t pack(float low, float high, cutlass::half_t) {
    __half2 const pair = __floats2half2_rn(low, high);
    return reinterpret_cast<uint32_t const&>(pair);
}

CUTLASS_DEVICE float2 unpack(uint32_t pair, cutlass::bfloat16_t) {
    return __bfloat1622float2(reinterpret_cast<__nv_bfloat162 const&>(pair));
}
CUTLASS_DEVICE float2 unpack(uint32_t pair, cutlass::half_t) {
    return __half22float2(reinterpret_cast<__half2 const&>(pair));
}

// Place among the scores of the i-th of 16 columns that a thread holds of a block, in its row 0 or 1.
CUTLASS_DEVICE constexpr int score_place(int block, int i, int row) { return i % 2 + 2 * row + 4 * (8 * block + i / 2); }

// Scores come as an accumulator of kBlocks * 32 numbers: column pair c, row r, group of 8 columns j at c + 2 r + 4 j;
// 8 groups make a block. Weights leave in the same order, two to a word.
template <Tracking kTracking, int kBlocks, class Element>
class Softmax {
  public:
    CUTLASS_DEVICE Softmax(float scale_log2) : scale_log2_(scale_log2) {}

    // Before a row of the mask. `valid`: the query is not past the end (those past it agree to everything). `lse_before`:
    // its natural LSE in the step before (rule `mass`).
    CUTLASS_DEVICE void begin(float threshold, bool const (&valid)[2], float const (&lse_before)[2]) {
        largest_ = 0.0f;
        CUTLASS_PRAGMA_UNROLL
        for (int r = 0; r < 2; ++r) {
            offset_[r] = NAN;
            sum_[r] = lost_[r] = 0.0f;
            if constexpr (kTracking == Tracking::kRunningMax) { limit_[r] = exp2f(threshold); }
            if constexpr (by_mass(kTracking)) {
                limit_[r] = lse_before[r] == INFINITY ? NAN : threshold + lse_before[r] * kLog2E;
            }
            if (!valid[r]) { limit_[r] = INFINITY; }
        }
    }

    // The first tile: takes its largest scores as offsets.
    template <class Scores>
    CUTLASS_DEVICE void first(Scores const& scores, uint32_t (&weights)[kBlocks * 16]) {
        float rescale[2];
        Offsets const offsets = raise<kBlocks>(scores, rescale);
        look<kBlocks>(scores);
        exponents<kBlocks>(scores, offsets, weights);
        add();
    }

    // A later tile, of kCount blocks; the weights of others are 0. True where earlier weights are to be multiplied by `rescale`.
    template <int kCount, class Scores>
    CUTLASS_DEVICE bool step(Scores const& scores, uint32_t (&weights)[kBlocks * 16], float (&rescale)[2]) {
        Offsets offsets = {offset_[0], offset_[1]};
        bool raised = false;
        // A loop, though it runs once or twice: with a copy of the exponents in a branch the compiler serializes the products.
        CUTLASS_PRAGMA_NO_UNROLL
        while (true) {
            look<kCount>(scores);
            exponents<kCount>(scores, offsets, weights);
            bool light = true;
            bool fits = true;
            CUTLASS_PRAGMA_UNROLL
            for (int r = 0; r < 2; ++r) {
                float mass = mass_[0][r];
                CUTLASS_PRAGMA_UNROLL
                for (int b = 1; b < kCount; ++b) { mass += mass_[b][r]; }
                // NaN does not fit: no offset yet, or NaN among the scores.
                fits = fits && mass <= kLargest<Element>;
                light = light && mass <= fminf(kHeavy * (sum_[r] + 1.0f), kLargest<Element>);
            }
            if (raised || __all_sync(~0u, light)) { break; }
            if (__all_sync(~0u, fits)) {
                sum_as_rounded<kCount>(weights);
                break;
            }
            offsets = raise<kCount>(scores, rescale);
            raised = true;
        }
        add();
        return raised;
    }

    // Bits of the blocks of the last tile, which has these weights, that a row of this warp wants to keep. `stamp` is 0 to the
    // caller, but the compiler sees that it depends on something, and does not move the work before that.
    CUTLASS_DEVICE uint32_t judge(uint32_t const (&weights)[kBlocks * 16], uint32_t stamp) {
        if constexpr (kTracking == Tracking::kRunningMax && kPackedMax) {
            for_all([&](int b, int r) {
                uint32_t pair = weights[score_place(b, 0, r) / 2] | stamp;
                CUTLASS_PRAGMA_UNROLL
                for (int i = 1; i < 8; ++i) { pair = larger_pair(pair, weights[score_place(b, 2 * i, r) / 2]); }
                most_[b][r] = Max{}(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000));
            });
        }
        auto after_stamp = [&](float& part) { part = __uint_as_float(__float_as_uint(part) | stamp); };
        for_all([&](int b, int r) { after_stamp(by_mass(kTracking) ? mass_[b][r] : most_[b][r]); });
        bool const odd = threadIdx.x & 1;
        float const limit = odd ? limit_[1] : limit_[0];
        if constexpr (kTracking == Tracking::kRunningMax) {
            return judge(most_, Max{}, [&](float most, float before) {
                float const bound = before * limit;
                return (most <= bound && (bound >= kTiny || before == 0.0f)) || limit == INFINITY;
            });
        }
        if constexpr (by_mass(kTracking)) {
            float const bound = exp2f(limit - (odd ? offset_[1] : offset_[0]));
            return judge(mass_, Sum{}, [&](float mass, float) {
                return mass <= (bound >= kTiny ? bound : kTiny) || limit == INFINITY;
            });
        }
        return 0;
    }

    // A tile of summaries: makes estimates of their blocks' masses, log2 units above kLevel, of the queries' products with the means,
    // which come in `estimates`, and those of their squares with the variances. `left`: keys from the first of the blocks on.
    template <class Estimates>
    CUTLASS_DEVICE void estimate(Estimates& estimates, Estimates const& variances, float variance_scale, int left) const {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < size(estimates); ++i) {
            estimates(i) = estimates(i) * scale_log2_ + sqrtf(variances(i) * variance_scale + kSpread * kSpread);
        }
        int const last = (left - 1) / kBlockK;
        int const last_keys = left - last * kBlockK;
        if (last < size(estimates) * 2 && last_keys < kBlockK) {
            float const fewer = log2f(last_keys) - log2f(kBlockK);
            for_columns(estimates, [&](int column, float& first, float& second) {
                if (column != last - first_column()) { return; }
                first += fewer;
                second += fewer;
            });
        }
    }

    // Bits of the blocks that a row of this warp wants to visit in the next step, by their estimates.
    template <int kSummaries, class Estimates>
    CUTLASS_DEVICE BlockBits<kSummaries> wanted(Estimates& estimates) const {
        BlockBits<kSummaries> bits{};
        for_columns(estimates, [&](int column, float first, float second) {
            bool const agrees = first <= limit_[0] - kLevel && second <= limit_[1] - kLevel;
            if (!agrees) { bits.word[column / 32] |= 1u << column % 32; }
        });
        CUTLASS_PRAGMA_UNROLL
        for (uint32_t& word : bits.word) { word = __reduce_or_sync(~0u, word << first_column()); }
        return bits;
    }

    // Weights of the blocks that summaries stand in for. True where earlier weights are to be multiplied by `rescale`.
    template <int kSummaries, class Estimates, int kWords>
    CUTLASS_DEVICE bool add_estimates(
        Estimates& estimates, BlockBits<kSummaries> const& stand_in, uint32_t (&weights)[kWords], float (&rescale)[2]) {
        for_columns(estimates, [&](int column, float& first, float& second) {
            if (stand_in.word[column / 32] >> first_column() >> column % 32 & 1) { return; }
            first = second = -INFINITY;
        });
        Offsets offsets = {offset_[0], offset_[1]};
        bool raised = false;
        float mass[2];
        CUTLASS_PRAGMA_NO_UNROLL
        while (true) {
            mass[0] = mass[1] = 0.0f;
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < size(estimates); i += 2) {
                int const r = i / 2 % 2;
                float const low = exp2f(estimates(i) - (offsets.row[r] - kLevel));
                float const high = exp2f(estimates(i + 1) - (offsets.row[r] - kLevel));
                mass[r] += low;
                mass[r] += high;
                weights[i / 2] = pack(low, high, Element{});
            }
            // NaN does not fit.
            bool const fits = mass[0] <= kLargest<Element> && mass[1] <= kLargest<Element>;
            if (raised || __all_sync(~0u, fits)) { break; }
            float most[2] = {-INFINITY, -INFINITY};
            for_columns(estimates, [&](int, float first, float second) {
                most[0] = Max{}(most[0], first + kLevel);
                most[1] = Max{}(most[1], second + kLevel);
            });
            offsets = raise_to(most, 1.0f, rescale);
            raised = true;
        }
        sum_[0] += mass[0];
        sum_[1] += mass[1];
        return raised;
    }

    // After a row of the mask: the factor of the output rows and their natural LSE.
    CUTLASS_DEVICE void end(float (&factor)[2], float (&lse)[2]) {
        CUTLASS_PRAGMA_UNROLL
        for (int r = 0; r < 2; ++r) {
            float const sum = join_quad(sum_[r], Sum{});
            factor[r] = sum == 0.0f ? 0.0f : 1.0f / sum;
            float const lost = join_quad(lost_[r], Sum{});
            lse[r] = sum == 0.0f ? -INFINITY : offset_[r] * kLn2 + logf(sum + lost);
        }
    }

  private:
    // The rule `running_max` compares weights as they are packed, two at a time, if those have the range of float.
    static constexpr bool kPackedMax = cute::is_same_v<Element, cutlass::bfloat16_t>;

    // Estimates: a block's spread is kSpread (sqrt(1 + variance / bend) - 1), and besides the root they have this.
    static constexpr float kSpread = kSummaryBend * kLog2E;
    static constexpr float kLevel = 6.0f - kSpread;
    static_assert(kBlockK == 1 << 6);

    struct Offsets {
        float row[2];
    };

    // The first column that a thread holds of a tile; `for_columns` counts from there.
    CUTLASS_DEVICE static int first_column() { return threadIdx.x % 4 * 2; }
    template <class Estimates, class Body>
    CUTLASS_DEVICE static void for_columns(Estimates& estimates, Body body) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < size(estimates) / 2; ++i) {
            body(i / 2 * 8 + i % 2, estimates(score_place(0, i, 0)), estimates(score_place(0, i, 1)));
        }
    }

    // Independent chains of work: two warps a scheduler hide no latency.
    template <int kCount = kBlocks, class Body>
    CUTLASS_DEVICE static void for_all(Body body) {
        CUTLASS_PRAGMA_UNROLL
        for (int b = 0; b < kCount; ++b) {
            body(b, 0);
            body(b, 1);
        }
    }

    // Raises the offsets to the largest scores seen. Returns the offsets of this tile: 0 where all scores are -inf.
    template <int kCount, class Scores>
    CUTLASS_DEVICE Offsets raise(Scores const& scores, float (&rescale)[2]) {
        float most[kCount][2];
        for_all<kCount>([&](int b, int r) { most[b][r] = scores(score_place(b, 0, r)); });
        CUTLASS_PRAGMA_UNROLL
        for (int i = 1; i < 16; ++i) {
            for_all<kCount>([&](int b, int r) { most[b][r] = Max{}(most[b][r], scores(score_place(b, i, r))); });
        }
        float largest[2];
        CUTLASS_PRAGMA_UNROLL
        for (int r = 0; r < 2; ++r) {
            largest[r] = most[0][r];
            CUTLASS_PRAGMA_UNROLL
            for (int b = 1; b < kCount; ++b) { largest[r] = Max{}(largest[r], most[b][r]); }
        }
        return raise_to(largest, scale_log2_, rescale);
    }

    // The same with the largest of each lane, in units of which `unit` is log2's.
    CUTLASS_DEVICE Offsets raise_to(float const (&of_lane)[2], float unit, float (&rescale)[2]) {
        Offsets offsets;
        CUTLASS_PRAGMA_UNROLL
        for (int r = 0; r < 2; ++r) {
            float largest = join_quad(of_lane[r], Max{}) * unit;
            bool const before = offset_[r] == offset_[r];
            if (before) { largest = Max{}(largest, offset_[r]); }
            rescale[r] = before ? exp2f(offset_[r] - largest) : 1.0f;
            sum_[r] *= rescale[r];
            lost_[r] *= rescale[r];
            offset_[r] = largest == -INFINITY ? NAN : largest;
            offsets.row[r] = largest == -INFINITY ? 0.0f : largest;
        }
        if constexpr (kTracking == Tracking::kRunningMax) { largest_ *= threadIdx.x & 1 ? rescale[1] : rescale[0]; }
        if constexpr (by_mass(kTracking)) { unsure_ = __any_sync(~0u, cannot_tell(0) || cannot_tell(1)); }
        return offsets;
    }

    // Weights of the scores, and what the rules want to know of each block.
    template <int kCount, class Scores>
    CUTLASS_DEVICE void exponents(Scores const& scores, Offsets const& offsets, uint32_t (&weights)[kBlocks * 16]) {
        for_all([&](int b, int r) { most_[b][r] = mass_[b][r] = 0.0f; });
        CUTLASS_PRAGMA_UNROLL
        for (int i = kCount * 16; i < kBlocks * 16; ++i) { weights[i] = 0; }
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 8; ++i) {
            for_all<kCount>([&](int b, int r) {
                float const low = exp2f(scores(score_place(b, 2 * i, r)) * scale_log2_ - offsets.row[r]);
                float const high = exp2f(scores(score_place(b, 2 * i + 1, r)) * scale_log2_ - offsets.row[r]);
                mass_[b][r] += low;
                mass_[b][r] += high;
                weights[score_place(b, 2 * i, r) / 2] = pack(low, high, Element{});
                if constexpr (kTracking == Tracking::kRunningMax && !kPackedMax) {
                    most_[b][r] = Max{}(Max{}(most_[b][r], low), high);
                }
            });
        }
    }

    // Makes up for what rounding does to the weights of this tile.
    template <int kCount>
    CUTLASS_DEVICE void sum_as_rounded(uint32_t const (&weights)[kBlocks * 16]) {
        float lost[kCount][2];
        for_all<kCount>([&](int b, int r) { lost[b][r] = mass_[b][r]; });
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 8; ++i) {
            for_all<kCount>([&](int b, int r) {
                float2 const pair = unpack(weights[score_place(b, 2 * i, r) / 2], Element{});
                lost[b][r] -= pair.x + pair.y;
            });
        }
        for_all<kCount>([&](int b, int r) {
            lost_[r] += lost[b][r];
            sum_[r] -= lost[b][r];
        });
    }

    // Looks, before the exponents, at the scores of rows of which the rule `mass` cannot tell: a block counts for all unless all its
    // scores are -inf.
    template <int kCount, class Scores>
    CUTLASS_DEVICE void look(Scores const& scores) {
        if constexpr (by_mass(kTracking)) {
            counts_ = ignored_ = 0;
            if (!unsure_) { return; }
            // Not a constant to the compiler, which would compare every score before it knows whether that is asked for.
            float hidden;
            asm volatile("mov.b32 %0, 0xff800000;" : "=f"(hidden));
            for_all<kCount>([&](int b, int r) {
                bool nothing = true;
                CUTLASS_PRAGMA_UNROLL
                for (int i = 0; i < 16; ++i) { nothing = nothing && scores(score_place(b, i, r)) == hidden; }
                if (cannot_tell(r)) { (nothing ? ignored_ : counts_) |= 1u << (2 * b + r); }
            });
        }
    }

    // No step before, or a limit out of the range of weights.
    CUTLASS_DEVICE bool cannot_tell(int r) const { return !(limit_[r] - offset_[r] >= -99.0f); }

    // Adds the tile to the rows' sums.
    CUTLASS_DEVICE void add() {
        for_all([&](int b, int r) { sum_[r] += mass_[b][r]; });
        if constexpr (by_mass(kTracking)) {
            if (unsure_) {
                for_all([&](int b, int r) {
                    if (counts_ >> (2 * b + r) & 1) { mass_[b][r] = INFINITY; }
                    if (ignored_ >> (2 * b + r) & 1) { mass_[b][r] = 0.0f; }
                });
            }
        }
    }

    // Joins each block's parts over the quad and asks `agrees(joined, before)` in one lane for each row and block, where
    // `before` joins what came before the block: odd lanes speak for the second row.
    template <class Join, class Agrees>
    CUTLASS_DEVICE uint32_t judge(float const (&part)[kBlocks][2], Join join, Agrees agrees) {
        constexpr uint32_t kLowerLanes = 0x33333333;
        bool const upper = threadIdx.x & 2;
        uint32_t keep = 0;
        CUTLASS_PRAGMA_UNROLL
        for (int b = 0; b + 1 < kBlocks; b += 2) {
            // The lower two lanes speak for the first block, the upper two for the second.
            float const mine = halve(
                halve(part[b][0], part[b][1], 1, join), halve(part[b + 1][0], part[b + 1][1], 1, join), 2, join);
            float const theirs = __shfl_xor_sync(~0u, mine, 2);
            uint32_t const against = ~__ballot_sync(~0u, agrees(mine, upper ? join(largest_, theirs) : largest_));
            keep |= (against & kLowerLanes ? 1u << b : 0u) | (against & ~kLowerLanes ? 2u << b : 0u);
            largest_ = join(largest_, join(mine, theirs));
        }
        if constexpr (kBlocks % 2 == 1) {
            constexpr int b = kBlocks - 1;
            float mine = halve(part[b][0], part[b][1], 1, join);
            mine = join(mine, __shfl_xor_sync(~0u, mine, 2));
            keep |= __all_sync(~0u, agrees(mine, largest_)) ? 0u : 1u << b;
            largest_ = join(largest_, mine);
        }
        return keep;
    }

    float scale_log2_;
    float offset_[2];         // log2 units; NaN before the first finite score
    float sum_[2];            // of this thread's columns, some of them as rounded
    float lost_[2];           // what those lost by that
    float mass_[kBlocks][2];  // of this thread's columns in the last tile
    float most_[kBlocks][2];  // largest weight among them
    bool unsure_;             // whether the rule `mass` cannot tell of some row of the warp
    uint32_t counts_;         // bits of blocks and such rows in the last tile: it counts for all
    uint32_t ignored_;        // it counts for nothing
    float limit_[2];          // of the rule: factor of the largest weight before, or log2 of a mass; inf past the end
    float largest_;           // weight in this lane's row before, in units of its offset
};

}  // namespace lite_attention::sm90
