// SPDX-License-Identifier: MIT
// The last kernel of a decode step: the parts of a row's key head are put together, in their order, and the state notes which
// blocks mattered. A thread block takes a chunk of a row and key head; that of the first chunk also writes the result.
#pragma once

#include "work.h"

namespace lite_attention::sm90 {

constexpr int kCombineWarps = 8;

// Log2 of the sum of a row's key head over its parts, for the query head lane % heads. Runs in a warp.
//
//   lses   (chunks, kChunkParts, heads)
//   parts  of each chunk
CUTLASS_DEVICE float sum_of_parts(float const* lses, int const* parts, int chunks, int heads) {
    LogSum sum;
#pragma unroll 8
    for (int i = threadIdx.x % kWarp; i < chunks * kChunkParts * heads; i += kWarp) {
        int const place = i / heads;
        sum.add(place % kChunkParts < parts[place / kChunkParts] ? lses[i] : -INFINITY);
    }
    sum.join_lanes(heads, kWarp);
    return sum.log2();
}

// Writes the output of a row's key head. Runs in a whole thread block. `lse`: of the query head lane % heads, in log2 units.
template <class Element>
CUTLASS_DEVICE void join_parts(
    KernelParams const& params, int row, int kv_head, int const* parts, int chunks, float const* lses, float const* outs, float lse) {
    constexpr int kThreads = kCombineWarps * kWarp;
    static_assert(kThreads % (kMaxGroup / 2) == 0);  // a thread has the same pair of heads in all of its channels
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
        for (int chunk = 0; chunk < chunks; ++chunk) {
            // All parts of a chunk at a time: each takes long to come.
            float2 of_part[kChunkParts];
            float2 part[kChunkParts];
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < kChunkParts; ++i) {
                bool const exists = i < parts[chunk];
                int64_t const place = chunk * kChunkParts + i;
                of_part[i] = exists ? *reinterpret_cast<float2 const*>(lses + place * heads + head) : float2{-INFINITY, -INFINITY};
                part[i] = exists ? reinterpret_cast<float2 const*>(outs)[place * items + item] : float2{};
            }
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < kChunkParts; ++i) {
                if (i < parts[chunk]) {
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
    int* const parts = reinterpret_cast<int*>(memory);  // of each chunk
    DecodeParams const& call = params.call;
    Workspace const& workspace = params.workspace;
    ChunkOfHead const place(params);
    auto const [chunk, pair, row, kv_head] = place;
    int const lane = threadIdx.x % kWarp;
    int const heads = workspace.heads;
    RowOptions const options(call, row);
    int const chunks = ceil_div(options.blocks, kChunkBlocks);

    // A lane has a word of the state.
    constexpr int kAtOnce = kChunkWords / kCombineWarps;
    int const of_chunk = options.tracked ? blocks_of_chunk(options.blocks, chunk) : 0;
    WordsOfWarp const words(chunk, of_chunk, kCombineWarps);
    bool const exists = words.first + lane < words.end;
    int32_t* const mask = place.mask(call) + words.first + lane;
    uint32_t const before = exists ? *mask : 0;
    cudaGridDependencySynchronize();  // everything is attended to
    if (chunk > 0 && of_chunk <= 0) { return; }

    uint32_t visits = 0;
    if (exists) {
        int const missing = max(0, (words.first + lane + 1) * kWordBlocks - options.blocks);  // of the word's blocks
        visits = options.everything ? ~0u >> missing : workspace.visited[pair * workspace.words + words.first + lane];
    }
    for (int i = threadIdx.x; i < chunks; i += kCombineWarps * kWarp) {
        int const blocks = blocks_of_chunk(options.blocks, i);
        parts[i] = parts_of(options.everything ? blocks : workspace.visits[pair * workspace.chunks + i], blocks);
    }
    __syncthreads();
    float const* const lses = workspace.lse + pair * workspace.segments * heads;
    float const lse = sum_of_parts(lses, parts, chunks, heads);
    if (chunk == 0) {
        if (threadIdx.x < params.group) {
            call.lse[static_cast<int64_t>(row) * call.heads + kv_head * params.group + threadIdx.x] = lse * kLn2;
        }
        join_parts<typename Config::Element>(
            params, row, kv_head, parts, chunks, lses, workspace.out + pair * workspace.segments * call.head_dim * heads, lse);
    }

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
