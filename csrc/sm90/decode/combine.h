// SPDX-License-Identifier: MIT
// The last kernel of a decode step: the parts of a row's key head are put together, in their order, and the state notes which
// blocks mattered. A thread block takes a chunk of a row and key head, and a share of its channels.
#pragma once

#include "work.h"

namespace lite_attention::sm90 {

constexpr int kCombineWarps = 8;

struct CombineStorage {
    float2 sums[kCombineWarps * kWarp];
    int parts;
    int places[1];  // of the parts
};

// Writes down at which places parts of a row's key head are, in their order, and how many there are. Runs in a warp.
//
//   parts(chunk)  how many a chunk has
template <class Parts>
CUTLASS_DEVICE int list_places(int* places, int chunks, Parts parts) {
    int listed = 0;
    for (int first = 0; first < chunks; first += kWarp) {
        int const chunk = first + static_cast<int>(threadIdx.x % kWarp);
        int const of_chunk = chunk < chunks ? parts(chunk) : 0;
        int const before = sum_of_lanes_before(of_chunk);
        for (int i = 0; i < of_chunk; ++i) { places[listed + before + i] = chunk * kChunkSlots + i; }
        listed += __shfl_sync(~0u, before + of_chunk, kWarp - 1);
    }
    return listed;
}

// Log2 of the sum of a row's key head over its parts, for the query head lane % heads. Runs in a warp. `lses`: (slots, heads).
CUTLASS_DEVICE float sum_of_parts(float const* lses, int const* places, int parts, int heads) {
    LogSum sum;
#pragma unroll 8
    for (int i = threadIdx.x % kWarp; i < parts * heads; i += kWarp) { sum.add(lses[places[i / heads] * heads + i % heads]); }
    sum.join_lanes(heads, kWarp);
    return sum.log2();
}

// Writes the output of a row's key head, the chunk's share of its channels. Runs in a whole thread block, whose threads also share
// the parts as far as there are more than channels.
//
//   lse   of the query head lane % heads, in log2 units
//   sums  (kThreads,) shared
template <class Element>
CUTLASS_DEVICE void join_parts(
    KernelParams const& params, ChunkOfHead const& place, int chunks, int const* places, int parts, float lse, float2* sums) {
    constexpr int kThreads = kCombineWarps * kWarp;
    static_assert(kThreads % (kMaxGroup / 2) == 0);  // a thread has the same pair of heads in all of its channels
    constexpr int kAtOnce = 16;                      // each part takes long to come
    DecodeParams const& call = params.call;
    Workspace const& workspace = params.workspace;
    int const heads = workspace.heads;
    int const head_pairs = heads / 2;
    int const of_chunk = ceil_div(call.head_dim, chunks);
    int const first_channel = min(call.head_dim, place.chunk * of_chunk);
    int const items = min(of_chunk, call.head_dim - first_channel) * head_pairs;
    int const shares = max(1, min(ceil_div(parts, kAtOnce), kThreads / max(1, items)));
    int const share = shares > 1 ? static_cast<int>(threadIdx.x) / items : 0;
    int const first_item = threadIdx.x - share * items;
    int const head = first_item % head_pairs * 2;
    float2 const lse_of_heads{__shfl_sync(~0u, lse, head), __shfl_sync(~0u, lse, head + 1)};
    float const* const lses = workspace.lse + place.pair * workspace.slots * heads;
    float const* const outs = workspace.out + (place.pair * workspace.slots * call.head_dim + first_channel) * heads;
    auto const add_up = [&](int item) {
        float2 sum{};
        for (int first = share * kAtOnce; first < parts; first += shares * kAtOnce) {
            float2 of_part[kAtOnce];
            float2 part[kAtOnce];
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < kAtOnce; ++i) {
                int64_t const slot = places[min(first + i, parts - 1)];
                of_part[i] = *reinterpret_cast<float2 const*>(lses + slot * heads + head);
                part[i] = reinterpret_cast<float2 const*>(outs)[slot * call.head_dim * head_pairs + item];
            }
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < kAtOnce; ++i) {
                if (first + i >= parts) { break; }
                sum.x += exp2f(of_part[i].x - lse_of_heads.x) * part[i].x;
                sum.y += exp2f(of_part[i].y - lse_of_heads.y) * part[i].y;
            }
        }
        return sum;
    };
    auto const write = [&](int item, float2 sum) {
        Element* const out = static_cast<Element*>(call.out) + place.row * call.out_row_stride +
                             (place.kv_head * params.group + head) * call.out_head_stride + first_channel + item / head_pairs;
        if (head < params.group) { *out = static_cast<Element>(sum.x); }
        if (head + 1 < params.group) { out[call.out_head_stride] = static_cast<Element>(sum.y); }
    };
    if (shares == 1) {
        for (int item = first_item; item < items; item += kThreads) { write(item, add_up(item)); }
        return;
    }
    float2 sum{};
    if (share < shares) { sums[threadIdx.x] = sum = add_up(first_item); }
    __syncthreads();
    if (share > 0) { return; }
    for (int other = 1; other < shares; ++other) {
        float2 const addend = sums[other * items + first_item];
        sum = {sum.x + addend.x, sum.y + addend.y};
    }
    write(first_item, sum);
}

template <class Config>
__global__ void __launch_bounds__(kCombineWarps * kWarp) combine_kernel(__grid_constant__ KernelParams const params) {
    extern __shared__ __align__(1024) uint8_t memory[];
    auto& shared = *reinterpret_cast<CombineStorage*>(memory);
    DecodeParams const& call = params.call;
    Workspace const& workspace = params.workspace;
    ChunkOfHead const place(params, blockIdx.x);
    auto const [chunk, pair, row, kv_head] = place;
    int const lane = threadIdx.x % kWarp;
    int const heads = workspace.heads;
    RowOptions const options(call, row);
    int const chunks = max(1, ceil_div(options.blocks, kChunkBlocks));

    // A lane has a word of the state.
    constexpr int kAtOnce = kChunkWords / kCombineWarps;
    int const of_chunk = options.tracked ? blocks_of_chunk(options.blocks, chunk) : 0;
    WordsOfWarp const words(chunk, of_chunk, kCombineWarps);
    bool const exists = words.first + lane < words.end;
    int32_t* const mask = words_of_mask(call, row, kv_head) + words.first + lane;
    uint32_t const before = exists ? *mask : 0;
    cudaGridDependencySynchronize();  // everything is attended to
    if (chunk >= chunks) { return; }

    uint32_t visits = 0;
    if (exists) {
        int const missing = max(0, (words.first + lane + 1) * kWordBlocks - options.blocks);  // of the word's blocks
        visits = options.everything ? ~0u >> missing : workspace.visited[pair * workspace.words + words.first + lane];
    }
    if (threadIdx.x < kWarp) {
        int const listed = list_places(shared.places, chunks, [&](int i) {
            int const blocks = blocks_of_chunk(options.blocks, i);
            if (options.everything) { return parts_of_all(blocks); }
            int64_t const list = pair * workspace.chunks + i;
            return parts_of(workspace.known[list], blocks) + parts_of(workspace.found[list], blocks);
        });
        if (threadIdx.x == 0) { shared.parts = listed; }
    }
    __syncthreads();
    float const lse = sum_of_parts(workspace.lse + pair * workspace.slots * heads, shared.places, shared.parts, heads);
    if (chunk == 0 && threadIdx.x < params.group) {
        call.lse[static_cast<int64_t>(row) * call.heads + kv_head * params.group + threadIdx.x] = lse * kLn2;
    }
    join_parts<typename Config::Element>(params, place, chunks, shared.places, shared.parts, lse, shared.sums);

    // The bits of what was visited: whether the share of a query head was above the threshold.
    float const* const masses = workspace.masses + (pair * workspace.words + words.first) * kWordBlocks * heads;
    float const limit = lane % heads < params.group ? options.threshold + lse : INFINITY;
    bool keeps[kAtOnce] = {};
#pragma unroll 2
    for (int head = 0; head < heads; head += 2) {
        float const low = __shfl_sync(~0u, limit, head);
        float const high = __shfl_sync(~0u, limit, head + 1);
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
            bool const is_visited = __shfl_sync(~0u, visits, i) >> lane & 1;
            int const block = i * kWordBlocks + lane;
            float2 const none{-INFINITY, -INFINITY};
            float2 const mass = is_visited ? *reinterpret_cast<float2 const*>(masses + block * heads + head) : none;
            keeps[i] |= mass.x > low || mass.y > high;
        }
    }
    uint32_t kept = 0;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
        uint32_t const of_word = __ballot_sync(~0u, keeps[i]);
        if (lane == i) { kept = of_word; }
    }
    if (exists) { *mask = (before & ~visits) | kept; }
}

}  // namespace lite_attention::sm90
