// SPDX-License-Identifier: MIT
// The arguments of the kernel, and how the work is cut in units, each one or several segments of a sequence and one key head. They
// begin at places that the row alone decides, so what it gets does not depend on its batch.
#pragma once

#include "config.h"

namespace lite_attention::sm90 {

// What thread blocks leave for others.
struct Workspace {
    uint32_t* drawn;      // units that were taken beside each thread block's first ones
    uint32_t* ended;      // (rows, kv_heads) units that are attended to
    uint32_t* estimated;  // (rows, kv_heads) units that are estimated
    uint32_t* visited;    // (rows, kv_heads, words) blocks that were visited
    float* expected;      // (rows, kv_heads, segments, heads) log2 of the mass that a unit probably has
    float* masses;        // (rows, kv_heads, blocks, heads) log2 of the mass that a block may have; once it is visited, that it has
    float* lse;           // (rows, kv_heads, segments, heads) of a unit, in log2 units
    float* out;           // (rows, kv_heads, segments, head_dim, heads) of a unit; not written where its lse is -inf

    int words;
    int segments;
    int heads;  // of a key head, rounded up: see workspace.h
};

struct KernelParams {
    // (channels of a plane, tokens of a page, planes, key heads, pages); where a box holds one plane, all channels are in it.
    CUtensorMap key;
    CUtensorMap value;
    int box_planes;
    DecodeParams call;
    Workspace workspace;
    int group;  // query heads of a key head
    float scale_log2;
};

CUTLASS_DEVICE int segments_of(int length) { return max(1, ceil_div(length, kSegmentBlocks * kDecodeBlock)); }

// The query heads of a row's key head.
template <class Element>
struct QueryView {
    Element const* data;
    int64_t head_stride;
    int heads;
    int head_dim;

    CUTLASS_DEVICE QueryView(KernelParams const& params, int row, int kv_head)
        : data(static_cast<Element const*>(params.call.query) + row * params.call.query_row_stride +
               kv_head * params.group * params.call.query_head_stride),
          head_stride(params.call.query_head_stride),
          heads(params.group),
          head_dim(params.call.head_dim) {}

    // Eight channels; zero where the head or the channel does not exist.
    CUTLASS_DEVICE uint4 load(int head, int channel) const {
        bool const exists = head < heads && channel < head_dim;
        return exists ? *reinterpret_cast<uint4 const*>(data + head * head_stride + channel) : uint4{};
    }
};

// A sum of numbers whose log2 is known, kept so that nothing overflows.
struct LogSum {
    float largest = -1e30f;
    float sum = 0.0f;  // in units of 2^largest

    CUTLASS_DEVICE void add(float log2_of_addend) { join(log2_of_addend, 1.0f); }
    CUTLASS_DEVICE void join(float of_other, float sum_of_other) {
        float const now = fmaxf(largest, of_other);
        sum = sum * exp2f(largest - now) + sum_of_other * exp2f(of_other - now);
        largest = now;
    }
    // Over lanes whose numbers differ in the bits from `distance` up to `end`.
    CUTLASS_DEVICE void join_lanes(int distance, int end) {
        for (; distance < end; distance *= 2) {
            join(__shfl_xor_sync(~0u, largest, distance), __shfl_xor_sync(~0u, sum, distance));
        }
    }
    CUTLASS_DEVICE float log2() const { return largest + log2f(sum); }
};

// Log2 of the sum of all parts of a row's key head, for the query head lane % heads. `values`: (parts, heads). Runs in a warp.
CUTLASS_DEVICE float sum_parts(float const* values, int parts, int heads) {
    LogSum sum;
#pragma unroll 8
    for (int i = threadIdx.x % kWarp; i < parts * heads; i += kWarp) { sum.add(values[i]); }
    sum.join_lanes(heads, kWarp);
    return sum.log2();
}

// Whether a row's state is updated.
CUTLASS_DEVICE bool tracks(DecodeParams const& call, int row) {
    return static_cast<int>(call.thresholds[row] != -INFINITY) & static_cast<int>(call.seq_lens[row] > 0);  // asks for both at once
}

// Whether a row visits all of its blocks.
CUTLASS_DEVICE bool visits_everything(DecodeParams const& call, int row) {
    bool const all = call.visit_all[row];
    return !tracks(call, row) || all;
}

CUTLASS_DEVICE int segments_of_unit(bool everything) { return everything ? 1 : kSkippingSegments; }

// Units of a row and key head.
CUTLASS_DEVICE int units_of(int length, bool everything) { return ceil_div(segments_of(length), segments_of_unit(everything)); }

// The order of all units: row by row, those that skip before those that visit everything, and of those that skip key head by key
// head, so that the first is estimated soon. The steps: some units are estimated; those that wait for no estimate are attended to;
// then, by turns, one that is estimated is attended to, and one further is estimated, so that neither waits for the other's memory.
struct Schedule {
    static constexpr int kRowBytes = sizeof(int) + sizeof(uint16_t);
    // Units of each thread block that are estimated between the last one that a unit waits for and the unit's turn.
    static constexpr int kLead = 3;

    int* first_unit;   // (rows,)
    uint16_t* ranked;  // (rows,) in their order
    int ahead;         // units that are estimated first: so many before a unit, all that it waits for are
    int estimates;     // units that are estimated
    int units;         // that are attended to

    // Runs in a whole thread block. `tables`: kRowBytes for each row, in shared memory.
    CUTLASS_DEVICE void init(DecodeParams const& call, int* tables) {
        // How many units a row has; negative where it visits everything, and not any more once its first one is known.
        for (int row = threadIdx.x; row < call.rows; row += blockDim.x) {
            bool const everything = visits_everything(call, row);
            int const count = units_of(call.seq_lens[row], everything) * call.kv_heads;
            tables[row] = everything ? -count : count;
        }
        __syncthreads();
        if (threadIdx.x < kWarp) {
            auto* const ranks = reinterpret_cast<uint16_t*>(tables + call.rows);
            int const lane = threadIdx.x;
            int before = 0;
            int rank = 0;
            int largest = 0;  // units of a key head
            CUTLASS_PRAGMA_UNROLL
            for (int sign = 1; sign >= -1; sign -= 2) {
                for (int start = 0; start < call.rows; start += kWarp) {
                    int const row = start + lane;
                    int const count = row < call.rows ? max(0, sign * tables[row]) : 0;
                    uint32_t const counted = __ballot_sync(~0u, count > 0);
                    int sum = count;
                    CUTLASS_PRAGMA_UNROLL
                    for (int distance = 1; distance < kWarp; distance *= 2) {
                        int const other = __shfl_up_sync(~0u, sum, distance);
                        if (lane >= distance) { sum += other; }
                    }
                    if (count > 0) {
                        tables[row] = before + sum - count;
                        ranks[rank + __popc(counted & ((1u << lane) - 1))] = row;
                    }
                    before += __shfl_sync(~0u, sum, kWarp - 1);
                    rank += __popc(counted);
                    if (sign > 0) { largest = max(largest, __reduce_max_sync(~0u, count) / call.kv_heads); }
                }
                if (lane == 0) { (sign > 0 ? estimates : units) = before; }
            }
            if (lane == 0) {
                ahead = min(estimates, largest + static_cast<int>(gridDim.x) * kLead);
                first_unit = tables;
                ranked = ranks;
            }
        }
        __syncthreads();
    }

    CUTLASS_DEVICE int steps() const { return estimates + units; }

    struct Step {
        int unit;
        bool estimates;  // the unit, and does not attend to it
    };
    CUTLASS_DEVICE Step step(int number) const {
        if (number < ahead) { return {number, true}; }
        number -= ahead;
        int const independent = units - estimates;
        if (number < independent) { return {estimates + number, false}; }
        number -= independent;
        int const turns = estimates - ahead;
        if (number < 2 * turns) { return number % 2 == 0 ? Step{number / 2, false} : Step{ahead + number / 2, true}; }
        return {number - turns, false};
    }
};

// A unit of work and what is to be known of its row.
struct Place {
    int row;
    int kv_head;
    int number;  // among those of the row and key head
    int64_t pair;  // number of the row and key head
    int length;
    int blocks;
    float threshold;
    bool tracked;
    bool everything;  // whether all blocks are visited

    CUTLASS_DEVICE Place(DecodeParams const& call, Schedule const& schedule, int unit) {
        int rank = 0;
        for (int end = call.rows; rank + 1 < end;) {
            int const middle = (rank + end) / 2;
            (schedule.first_unit[schedule.ranked[middle]] <= unit ? rank : end) = middle;
        }
        row = schedule.ranked[rank];
        int const of_row = unit - schedule.first_unit[row];
        length = max(0, call.seq_lens[row]);
        everything = visits_everything(call, row);
        int const units = units_of(length, everything);
        kv_head = everything ? of_row % call.kv_heads : of_row / units;
        number = everything ? of_row / call.kv_heads : of_row % units;
        pair = static_cast<int64_t>(row) * call.kv_heads + kv_head;
        blocks = ceil_div(length, kDecodeBlock);
        threshold = call.thresholds[row];
        tracked = tracks(call, row);
    }

    // Units of the row and key head.
    CUTLASS_DEVICE int units() const { return units_of(length, everything); }

    // Blocks that are visited whatever they weigh: the first, and the newest two, which may have no summary yet.
    CUTLASS_DEVICE bool forced(int block) const { return block == 0 || block >= blocks - 2; }
};

}  // namespace lite_attention::sm90
