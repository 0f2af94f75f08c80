// SPDX-License-Identifier: MIT
// The second kernel of a decode step: which blocks rows that skip visit. What the first has estimated is compared with what all
// blocks of a key head have together. A thread block takes a chunk of a row and key head.
#pragma once

#include "score.h"

namespace lite_attention::sm90 {

constexpr int kListWarps = 8;
constexpr int kForced = 3;  // blocks: see is_forced

// Log2 of each head's mass of the blocks that are visited in any case; -inf where there are not as many. Runs in kForced warps.
template <class Config>
CUTLASS_DEVICE void weigh_forced(KernelParams const& params, int row, int kv_head, int length, float* exact) {
    using Element = typename Config::Element;
    DecodeParams const& call = params.call;
    int const lane = threadIdx.x % kWarp;
    int const number = threadIdx.x / kWarp;
    int const block = number == 0 ? 0 : ceil_div(length, kDecodeBlock) - number;
    bool const exists = number == 0 || block > 0;
    int const blocks_of_page = call.page_size / kDecodeBlock;
    int const page = exists ? call.block_table[row * call.block_table_stride + block / blocks_of_page] : 0;
    auto const* const keys = static_cast<Element const*>(call.key.data) + page * call.key.page_stride +
                             block % blocks_of_page * kDecodeBlock * call.key.token_stride + kv_head * call.key.head_stride;
    QueryView<Element> const query(params, row, kv_head);
    CUTLASS_PRAGMA_UNROLL
    for (int tile = 0; tile < Config::kHeadTiles; ++tile) {
        float2 mass{-INFINITY, -INFINITY};
        if (exists) {
            int const count = min(kDecodeBlock, length - block * kDecodeBlock);
            mass = exact_mass<Config>(keys, call.key.token_stride, count, query, tile * kHeadTile, params.scale_log2);
        }
        int const head = tile * kHeadTile + lane * 2;
        if (lane < 4 && head < params.workspace.heads) {
            *reinterpret_cast<float2*>(exact + number * params.workspace.heads + head) = mass;
        }
    }
}

// Log2 of the sum of a row's key head over its parts, for the query head lane % heads. `values`: (parts, heads), in memory, and
// `others`: (other_parts, heads). Runs in a whole thread block; every warp gets the result.
CUTLASS_DEVICE float sum_in_thread_block(float const* values, int parts, float const* others, int other_parts, int heads) {
    __shared__ float2 sums[kListWarps][kMaxGroup];
    int const lane = threadIdx.x % kWarp;
    LogSum sum;
#pragma unroll 8
    for (int i = threadIdx.x; i < parts * heads; i += kListWarps * kWarp) { sum.add(values[i]); }
    if (threadIdx.x < other_parts * heads) { sum.add(others[threadIdx.x]); }
    sum.join_lanes(heads, kWarp);
    if (lane < heads) { sums[threadIdx.x / kWarp][lane] = {sum.largest, sum.sum}; }
    __syncthreads();
    LogSum total;
    CUTLASS_PRAGMA_UNROLL
    for (int warp = 0; warp < kListWarps; ++warp) {
        float2 const of_warp = sums[warp][lane % heads];
        total.join(of_warp.x, of_warp.y);
    }
    return total.log2();
}

template <class Config>
__global__ void __launch_bounds__(kListWarps * kWarp, 4) list_kernel(__grid_constant__ KernelParams const params) {
    __shared__ int counts[kListWarps];
    alignas(8) __shared__ float exact[kForced * kMaxGroup];
    // The next kernel waits where it needs what this one writes.
    cudaTriggerProgrammaticLaunchCompletion();
    DecodeParams const& call = params.call;
    Workspace const& workspace = params.workspace;
    ChunkOfHead const place(params);
    auto const [chunk, pair, row, kv_head] = place;
    int const warp = threadIdx.x / kWarp;
    int const lane = threadIdx.x % kWarp;
    RowOptions const options(call, row);
    int const of_chunk = blocks_of_chunk(options.blocks, chunk);
    if (options.everything || of_chunk <= 0) {
        if (options.everything && chunk == 0 && threadIdx.x == 0) { atomicAdd(&call.visited[row], options.blocks); }
        cudaGridDependencySynchronize();  // who waits for this kernel has waited for the one before
        return;
    }

    // What is read is asked for at once as far as can be, and before the estimates are there: the words of a warp are next to
    // each other.
    constexpr int kAtOnce = kChunkWords / kListWarps;
    WordsOfWarp const words(chunk, of_chunk, kListWarps);
    auto const block_of = [&](int i) { return (words.first + i) * kWordBlocks + lane; };
    int const blocks_of_page = call.page_size / kDecodeBlock;
    bool exists[kAtOnce];
    int page[kAtOnce];
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
        exists[i] = words.first + i < words.end && block_of(i) < options.blocks;
        page[i] = exists[i] ? call.block_table[row * call.block_table_stride + block_of(i) / blocks_of_page] : 0;
    }
    int32_t const* const mattered_before = place.mask(call);
    uint32_t const mattered = words.first + lane < words.end ? mattered_before[words.first + lane] : 0;
    if (warp < kForced) { weigh_forced<Config>(params, row, kv_head, options.length, exact); }
    __syncthreads();
    cudaGridDependencySynchronize();  // the estimates are there

    int const heads = workspace.heads;
    float const* const masses = workspace.masses + pair * workspace.words * kWordBlocks * heads;
    float const mass = sum_in_thread_block(
        workspace.expected + pair * workspace.tiles * heads, ceil_div(options.blocks, kTileBlocks), exact, kForced, heads);
    // The least log2 of a mass that is worth a visit, for the head lane % heads.
    float const limit = lane % heads < params.group ? options.threshold + mass : INFINITY;
    bool matters[kAtOnce];
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
        uint32_t const word = __shfl_sync(~0u, mattered, i);  // by all lanes, so not behind `||`
        matters[i] = is_forced(block_of(i), options.blocks) || (word >> lane & 1);
    }
#pragma unroll 2
    for (int head = 0; head < heads; head += 2) {
        float const low = __shfl_sync(~0u, limit, head);
        float const high = __shfl_sync(~0u, limit, head + 1);
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
            int64_t const block = exists[i] ? block_of(i) : 0;
            float2 const may_be = *reinterpret_cast<float2 const*>(masses + block * heads + head);
            matters[i] |= may_be.x > low || may_be.y > high;
        }
    }
    uint32_t visited[kAtOnce];
    int of_warp = 0;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
        visited[i] = __ballot_sync(~0u, exists[i] && matters[i]);
        of_warp += __popc(visited[i]);
        if (lane == i && words.first + i < words.end) { workspace.visited[pair * workspace.words + words.first + i] = visited[i]; }
    }
    if (lane == 0) { counts[warp] = of_warp; }
    __syncthreads();
    int at = 0;
    int listed = 0;
    CUTLASS_PRAGMA_UNROLL
    for (int w = 0; w < kListWarps; ++w) {
        at += w < warp ? counts[w] : 0;
        listed += counts[w];
    }
    Visit* const list = workspace.list + pair * workspace.words * kWordBlocks + chunk * kChunkBlocks;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
        if (visited[i] >> lane & 1) { list[at + __popc(visited[i] & ((1u << lane) - 1))] = {page[i], block_of(i)}; }
        at += __popc(visited[i]);
    }
    if (threadIdx.x == 0) {
        workspace.visits[pair * workspace.chunks + chunk] = listed;
        atomicAdd(&workspace.parts[row], parts_of(listed, of_chunk));
        atomicAdd(&call.visited[row], listed);
    }
}

}  // namespace lite_attention::sm90
