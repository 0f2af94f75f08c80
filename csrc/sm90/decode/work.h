// SPDX-License-Identifier: MIT
// What the kernels of a decode step share: their arguments, and how the work is cut in units, of a row and one key head each: where
// they begin and end the row alone decides, so what it gets does not depend on its batch.
#pragma once

#include <cutlass/fast_math.h>

#include "config.h"
#include "keep.h"
#include "workspace.h"

namespace lite_attention::sm90 {

// What thread blocks leave for others. Of rows that skip only, as others visit everything: which blocks are known to be visited
// before anything is estimated, and which estimates find.
struct Workspace {
    Counters* counters;
    int* found_parts;   // (rows,) of all key heads
    int* known;         // (rows, kv_heads, chunks) blocks
    int* found;         // (rows, kv_heads, chunks) blocks
    uint32_t* visited;  // (rows, kv_heads, words) a bit for each block
    int* list;          // (rows, kv_heads, blocks) of a chunk the blocks that are known, then those found
    float* expected;    // (rows, kv_heads, tiles, heads) log2 of the mass that a tile's blocks but the forced ones probably have
    float* masses;      // (rows, kv_heads, blocks, heads) log2 of the mass that a block may have; once it is visited, that it has
    float* lse;         // (rows, kv_heads, slots, heads) of a part, in log2 units
    float* out;         // (rows, kv_heads, slots, head_dim, heads) of a part; not written where its lse is -inf

    int words;
    int tiles;
    int chunks;
    int slots;
    int heads;  // of a key head, rounded up: see workspace.h
};

struct KernelParams {
    // (channels of a plane, tokens of a page, planes, key heads, pages); where a box holds one plane, all channels are in it.
    CUtensorMap key;
    CUtensorMap value;
    int box_planes;
    DecodeParams call;
    Workspace workspace;
    int group;           // query heads of a key head
    int heads_together;  // key heads whose summaries are brought at once
    int estimating_warps;
    int finders_together;  // warps that find the blocks of a chunk together
    // Divisors.
    cutlass::FastDivmod chunks;
    cutlass::FastDivmod kv_heads;
    cutlass::FastDivmod page_blocks;  // of a page
    float scale_log2;
};

constexpr int kChunkWords = kChunkBlocks / kWordBlocks;

// Blocks of a chunk of a row that has `blocks`.
CUTLASS_DEVICE int blocks_of_chunk(int blocks, int chunk) { return min(kChunkBlocks, blocks - chunk * kChunkBlocks); }

// A chunk of a row and key head: the number-th of all.
struct ChunkOfHead {
    int chunk;
    int64_t pair;  // row and key head
    int row;
    int kv_head;

    CUTLASS_DEVICE ChunkOfHead(KernelParams const& params, int number) {
        int pair_number;
        params.chunks(pair_number, chunk, number);
        params.kv_heads(row, kv_head, pair_number);
        pair = pair_number;
    }
};

// How many there are.
CUTLASS_DEVICE int lists(KernelParams const& params) {
    return params.call.rows * params.call.kv_heads * params.workspace.chunks;
}

// The words of the state of a row's key head.
CUTLASS_DEVICE int32_t* words_of_mask(DecodeParams const& call, int row, int kv_head) {
    return call.mask + load_kept(call.slots + row) * call.mask_slot_stride + kv_head * call.mask_head_stride;
}

// In how many parts a chunk is cut of which everything is visited. `blocks`: of the chunk.
CUTLASS_DEVICE int parts_of_all(int blocks) { return ceil_div(blocks, kSegmentBlocks); }

// In how many parts blocks of a chunk are cut that are known, or found, all of about the same size: of kPartBlocks, or more where
// half of the chunk's parts would not do. So both together have three halves of its parts at most.
CUTLASS_DEVICE int parts_of(int visits, int blocks) {
    return min(ceil_div(visits, kPartBlocks), max(ceil_div(visits, kSegmentBlocks), ceil_div(parts_of_all(blocks), 2)));
}

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

    CUTLASS_DEVICE void add(float log2_of_addend) { join({log2_of_addend, 1.0f}); }
    CUTLASS_DEVICE void join(LogSum const& other) {
        float const now = fmaxf(largest, other.largest);
        sum = sum * exp2f(largest - now) + other.sum * exp2f(other.largest - now);
        largest = now;
    }
    // Over lanes whose numbers differ in the bits from `distance` up to `end`.
    CUTLASS_DEVICE void join_lanes(int distance, int end) {
#pragma unroll 1
        for (; distance < end; distance *= 2) {
            join({__shfl_xor_sync(~0u, largest, distance), __shfl_xor_sync(~0u, sum, distance)});
        }
    }
    // Those of a warp's lane, of so many that lie side by side. `load(i)`: the i-th; many are asked for before one is needed.
    template <class Load>
    CUTLASS_DEVICE void add_all(int count, Load load) {
        constexpr int kAtOnce = 16;
#pragma unroll 1
        for (int first = threadIdx.x % kWarp; first < count; first += kAtOnce * kWarp) {
            float values[kAtOnce];
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < kAtOnce; ++i) { values[i] = first + i * kWarp < count ? load(first + i * kWarp) : -INFINITY; }
            LogSum together;
            CUTLASS_PRAGMA_UNROLL
            for (float value : values) { together.largest = fmaxf(together.largest, value); }
            CUTLASS_PRAGMA_UNROLL
            for (float value : values) { together.sum += exp2f(value - together.largest); }
            join(together);
        }
    }
    CUTLASS_DEVICE float log2() const { return largest + log2f(sum); }
};

// How long a row is, and what is done with it.
struct RowShape {
    int length;
    bool tracked;     // whether the state is updated
    bool everything;  // whether all blocks are visited

    CUTLASS_DEVICE int blocks() const { return ceil_div(length, kDecodeBlock); }
};

// What a call wants of a row. All of it is asked for at once: each takes long to come.
struct RowOptions : RowShape {
    float threshold;

    CUTLASS_DEVICE RowOptions(DecodeParams const& call, int row) {
        bool const visit_all = call.visit_all[row];
        length = max(0, load_kept(call.seq_lens + row));
        threshold = load_kept(call.thresholds + row);
        // Not `&&` and `||`, which would read one after the other.
        tracked = (threshold != -INFINITY) & (length > 0);
        everything = !tracked | visit_all;
    }
};

// What a thread block notes of the rows, in shared memory behind everything else: numbers, so many for each row.
class RowTable {
  public:
    static constexpr int bytes(int rows) { return (2 * rows + 1) * static_cast<int>(sizeof(int)); }

    // Which unit of work is the first of each row; behind the last row, how many there are.
    CUTLASS_DEVICE int* first_unit() { return numbers_; }

    CUTLASS_DEVICE void note(int rows, int row, RowShape const& shape) {
        numbers_[rows + 1 + row] = shape.length << 2 | shape.tracked << 1 | shape.everything;
    }
    CUTLASS_DEVICE RowShape shape(int rows, int row) const {
        int const noted = numbers_[rows + 1 + row];
        return {noted >> 2, (noted >> 1 & 1) != 0, (noted & 1) != 0};
    }

  private:
    int numbers_[1];
};

// Blocks of a row that are visited whatever they weigh: the first, and the newest two, which may have no summary yet.
constexpr int kForced = 3;
// The i-th of them; below zero, or again the first, where there are not as many.
CUTLASS_DEVICE int forced_block(int i, int blocks) { return i == 0 ? 0 : blocks - i; }
// A bit for each of 32 blocks from `first` on: whether it is one, or stands behind the row's end.
CUTLASS_DEVICE uint32_t forced_bits(int first, int blocks) {
    int const others = blocks - (kForced - 1) - first;
    uint32_t const newest = others < kWordBlocks ? ~0u << max(0, others) : 0;
    return newest | (first == 0);
}

// Waits until others have counted so far in the lower 32 bits of a number, which it returns. For one thread: many that ask keep
// others from the same part of the L2 cache.
template <class Number>
CUTLASS_DEVICE Number wait_for(Number const* counter, uint32_t count) {
    for (;;) {
        Number const counted = load_acquire(counter);
        if (static_cast<uint32_t>(counted) >= count) { return counted; }
        __nanosleep(200);
    }
}

// Adds a number, once what this warp has written is there for who loads the sum. Runs in a whole warp.
template <class Number>
CUTLASS_DEVICE void count_done(Number* counter, Number number) {
    __threadfence();
    __syncwarp();
    if (threadIdx.x % kWarp == 0) { atomicAdd(counter, number); }
}

// Which row a unit of work is of. `first_unit`: see number_units.
CUTLASS_DEVICE int row_of(int const* first_unit, int rows, int index) {
    int row = 0;
    for (int end = rows; row + 1 < end;) {
        int const middle = (row + end) / 2;
        (first_unit[middle] <= index ? row : end) = middle;
    }
    return row;
}

// The sum of the values of the lanes before this one.
CUTLASS_DEVICE int sum_of_lanes_before(int value) {
    int sum = value;
    CUTLASS_PRAGMA_UNROLL
    for (int distance = 1; distance < kWarp; distance *= 2) {
        int const other = __shfl_up_sync(~0u, sum, distance);
        if (static_cast<int>(threadIdx.x % kWarp) >= distance) { sum += other; }
    }
    return sum - value;
}

// Fills in which unit of work is the first of each row; behind the last row, how many there are. `first_unit`: how many each row
// has. Runs in a whole thread block, which has filled it in.
CUTLASS_DEVICE void number_units(int* first_unit, int rows) {
    __syncthreads();
    if (threadIdx.x < kWarp) {
        int before = 0;
        for (int start = 0; start < rows; start += kWarp) {
            int const row = start + threadIdx.x;
            int const units = row < rows ? first_unit[row] : 0;
            int const first = before + sum_of_lanes_before(units);
            if (row < rows) { first_unit[row] = first; }
            before = __shfl_sync(~0u, first + units, kWarp - 1);
        }
        if (threadIdx.x == 0) { first_unit[rows] = before; }
    }
    __syncthreads();
}

}  // namespace lite_attention::sm90
