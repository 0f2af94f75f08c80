// SPDX-License-Identifier: MIT
// The last kernel of a decode step: the parts of a row's key head are put together, in their order, and the state notes which
// blocks mattered. A thread block takes a chunk of a row and key head; that of the first chunk also writes the result.
#pragma once

#include "work.h"

namespace lite_attention::sm90 {

constexpr int kCombineWarps = 8;

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

// Writes the output of a row's key head. Runs in a whole thread block. `lse`: of the query head lane % heads, in log2 units.
template <class Element>
CUTLASS_DEVICE void join_parts(
    KernelParams const& params, int row, int kv_head, int const* places, int parts, float const* lses, float const* outs, float lse) {
    constexpr int kThreads = kCombineWarps * kWarp;
    static_assert(kThreads % (kMaxGroup / 2) == 0);  // a thread has the same pair of heads in all of its channels
    constexpr int kAtOnce = 16;                      // each part takes long to come
    DecodeParams const& call = params.call;
    int const heads = params.workspace.heads;
    int const head_pairs = heads / 2;
    int const head = threadIdx.x % head_pairs * 2;
    float2 const lse_of_heads{__shfl_sync(~0u, lse, head), __shfl_sync(~0u, lse, head + 1)};
    int const items = call.head_dim * head_pairs;
    Element* const out = static_cast<Element*>(call.out) + row * call.out_row_stride +
                         (kv_head * params.group + head) * call.out_head_stride;
    for (int item = threadIdx.x; item < items; item += kThreads) {
        float2 sum{};
        for (int first = 0; first < parts; first += kAtOnce) {
            float2 of_part[kAtOnce];
            float2 part[kAtOnce];
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < kAtOnce; ++i) {
                bool const exists = first + i < parts;
                int64_t const place = exists ? places[first + i] : 0;
                of_part[i] = exists ? *reinterpret_cast<float2 const*>(lses + place * heads + head) : float2{-INFINITY, -INFINITY};
                part[i] = exists ? reinterpret_cast<float2 const*>(outs)[place * items + item] : float2{};
            }
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < kAtOnce; ++i) {
                if (first + i < parts) {
                    sum.x += exp2f(of_part[i].x - lse_of_heads.x) * part[i].x;
                    sum.y += exp2f(of_part[i].y - lse_of_heads.y) * part[i].y;
                }
            }
        }
        int const channel = item / head_pairs;
        if (head < params.group) { out[channel] = static_cast<Element>(sum.x); }
        if (head + 1 < params.group) { out[call.out_head_stride + channel] = static_cast<Element>(sum.y); }
    }
}

template <class Config>
__global__ void __launch_bounds__(kCombineWarps * kWarp) combine_kernel(__grid_constant__ KernelParams const params) {
    extern __shared__ __align__(1024) uint8_t memory[];
    int& parts = *reinterpret_cast<int*>(memory);
    int* const places = &parts + 1;
    DecodeParams const& call = params.call;
    Workspace const& workspace = params.workspace;
    auto const [chunk, pair, row, kv_head] = ChunkOfHead(params, blockIdx.x);
    int const lane = threadIdx.x % kWarp;
    int const heads = workspace.heads;
    RowOptions const options(call, row);
    int const chunks = ceil_div(options.blocks, kChunkBlocks);

    // Warps share the words of the state, each some that are next to each other, and a lane one of them.
    constexpr int kAtOnce = kChunkWords / kCombineWarps;
    int const of_chunk = options.tracked ? blocks_of_chunk(options.blocks, chunk) : 0;
    int const words = ceil_div(max(0, of_chunk), kWordBlocks);
    int const words_of_warp = ceil_div(words, kCombineWarps);
    int const word_of_chunk = static_cast<int>(threadIdx.x) / kWarp * words_of_warp;
    int const first_word = chunk * kChunkWords + word_of_chunk;
    bool const exists = lane < words_of_warp && word_of_chunk + lane < words;
    int32_t* const mask = words_of_mask(call, row, kv_head) + first_word + lane;
    uint32_t const before = exists ? *mask : 0;
    cudaGridDependencySynchronize();  // everything is attended to
    if (chunk > 0 && of_chunk <= 0) { return; }

    uint32_t visits = 0;
    if (exists) {
        int const missing = max(0, (first_word + lane + 1) * kWordBlocks - options.blocks);  // of the word's blocks
        visits = options.everything ? ~0u >> missing : workspace.visited[pair * workspace.words + first_word + lane];
    }
    if (threadIdx.x < kWarp) {
        int const listed = list_places(places, chunks, [&](int i) {
            int const blocks = blocks_of_chunk(options.blocks, i);
            if (options.everything) { return parts_of_all(blocks); }
            int64_t const list = pair * workspace.chunks + i;
            return parts_of(workspace.known[list], blocks) + parts_of(workspace.found[list], blocks);
        });
        if (threadIdx.x == 0) { parts = listed; }
    }
    __syncthreads();
    float const* const lses = workspace.lse + pair * workspace.slots * heads;
    float const lse = sum_of_parts(lses, places, parts, heads);
    if (chunk == 0) {
        if (threadIdx.x < params.group) {
            call.lse[static_cast<int64_t>(row) * call.heads + kv_head * params.group + threadIdx.x] = lse * kLn2;
        }
        join_parts<typename Config::Element>(
            params, row, kv_head, places, parts, lses, workspace.out + pair * workspace.slots * call.head_dim * heads, lse);
    }

    // The bits of what was visited: whether the share of a query head was above the threshold.
    float const* const masses = workspace.masses + (pair * workspace.words + first_word) * kWordBlocks * heads;
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
