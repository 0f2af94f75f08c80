// SPDX-License-Identifier: MIT
// What the kernels of a decode step share: their arguments, and how the work is cut in units, each a segment of a sequence and one
// key head. Segments begin at fixed places, so what a row gets does not depend on its batch.
#pragma once

#include "mma.h"

namespace lite_attention::sm90 {

// What a kernel of a call leaves for the next.
struct Workspace {
    int32_t* drawn;     // units that were taken beside each thread block's first ones; zero between calls
    uint32_t* visited;  // (rows, kv_heads, words) blocks that were visited
    float* expected;    // (rows, kv_heads, segments, group) log2 of the mass that a segment probably has
    float* masses;      // (rows, kv_heads, blocks, group) log2 of the mass that a block may have; once it is visited, that it has
    float* lse;         // (rows, kv_heads, segments, group) of a segment, in log2 units
    float* out;         // (rows, kv_heads, segments, head_dim, group) of a segment; not written where its lse is -inf

    int words;
    int segments;
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

// A unit of work and what is to be known of its row.
struct Place {
    int row;
    int kv_head;
    int segment;
    int64_t pair;  // number of the row and key head
    int64_t part;  // number of the row, key head and segment
    int length;
    int blocks;
    float threshold;
    bool tracked;     // whether the state is updated
    bool everything;  // whether all blocks are visited

    // `first_unit`: see number_units.
    CUTLASS_DEVICE Place(DecodeParams const& call, Workspace const& workspace, int const* first_unit, int index) {
        row = 0;
        for (int end = call.rows; row + 1 < end;) {
            int const middle = (row + end) / 2;
            (first_unit[middle] <= index ? row : end) = middle;
        }
        kv_head = (index - first_unit[row]) % call.kv_heads;
        segment = (index - first_unit[row]) / call.kv_heads;
        pair = static_cast<int64_t>(row) * call.kv_heads + kv_head;
        part = pair * workspace.segments + segment;
        length = max(0, call.seq_lens[row]);
        blocks = ceil_div(length, kDecodeBlock);
        threshold = call.thresholds[row];
        tracked = threshold != -INFINITY && length > 0;
        everything = !tracked || call.visit_all[row];
    }

    // Blocks that are visited whatever they weigh: the first, and the newest two, which may have no summary yet.
    CUTLASS_DEVICE bool forced(int block) const { return block == 0 || block >= blocks - 2; }
};

// Fills in which unit of work is the first of each row; behind the last row, how many there are. Runs in a whole thread block.
CUTLASS_DEVICE void number_units(DecodeParams const& call, int* first_unit) {
    for (int row = threadIdx.x; row < call.rows; row += blockDim.x) {
        first_unit[row] = segments_of(call.seq_lens[row]) * call.kv_heads;
    }
    __syncthreads();
    if (threadIdx.x < kWarp) {
        int before = 0;
        for (int start = 0; start < call.rows; start += kWarp) {
            int const row = start + threadIdx.x;
            int const units = row < call.rows ? first_unit[row] : 0;
            int sum = units;
            CUTLASS_PRAGMA_UNROLL
            for (int distance = 1; distance < kWarp; distance *= 2) {
                int const other = __shfl_up_sync(~0u, sum, distance);
                if (static_cast<int>(threadIdx.x) >= distance) { sum += other; }
            }
            if (row < call.rows) { first_unit[row] = before + sum - units; }
            before += __shfl_sync(~0u, sum, kWarp - 1);
        }
        if (threadIdx.x == 0) { first_unit[call.rows] = before; }
    }
    __syncthreads();
}

// Copies the queries of a row's key head to shared memory; heads and channels that do not exist are zero. Called by `threads`
// threads.
template <class Config>
CUTLASS_DEVICE void copy_queries(
    KernelParams const& params, Place const& place, typename Config::Element* to, int thread, int threads) {
    using Element = typename Config::Element;
    DecodeParams const& call = params.call;
    Element const* const query = static_cast<Element const*>(call.query) + place.row * call.query_row_stride +
                                 place.kv_head * params.group * call.query_head_stride;
    constexpr int kVector = 8;  // elements that are copied at a time
    constexpr int kRowVectors = Config::kHeadDim / kVector;
    for (int i = thread; i < Config::kHeads * kRowVectors; i += threads) {
        int const head = i / kRowVectors;
        int const channel = i % kRowVectors * kVector;
        bool const exists = head < params.group && channel < call.head_dim;
        *reinterpret_cast<uint4*>(to + head * Config::kQueryRow + channel) =
            exists ? *reinterpret_cast<uint4 const*>(query + head * call.query_head_stride + channel) : uint4{};
    }
}

}  // namespace lite_attention::sm90
