// SPDX-License-Identifier: MIT
// The last kernel of a decode step: the parts of a row's key head are put together, and the state notes which blocks mattered. A
// thread block takes a chunk of a row and key head; those of a long row share its channels.
#pragma once

#include "work.h"

namespace lite_attention::sm90 {

constexpr int kCombineWarps = 8;
constexpr int kCombineThreads = kCombineWarps * kWarp;
constexpr int kCombineBlocks = 4;  // thread blocks that a multiprocessor has room for
constexpr int kSharers = 8;        // thread blocks that share the channels of a row's key head, at most

struct CombineStorage {
    int parts;
    LogSum lse[kCombineWarps][kMaxGroup];
    float4 sums[kCombineThreads];
    int places[1];  // of the parts, in their order; then what each of them weighs for each head

    static int bytes(int chunks, int heads) {
        return static_cast<int>(sizeof(CombineStorage) + chunks * kChunkSlots * (1 + heads) * sizeof(int));
    }
};

// Writes down at which places parts of a row's key head are, in their order, and how many there are. Runs in a warp.
//
//   parts(chunk)  how many a chunk has
template <class Parts>
CUTLASS_DEVICE int list_places(int* places, int chunks, Parts parts) {
    int listed = 0;
#pragma unroll 1
    for (int first = 0; first < chunks; first += kWarp) {
        int const chunk = first + static_cast<int>(threadIdx.x % kWarp);
        int const of_chunk = chunk < chunks ? parts(chunk) : 0;
        int const before = sum_of_lanes_before(of_chunk);
#pragma unroll 1
        for (int i = 0; i < of_chunk; ++i) { places[listed + before + i] = chunk * kChunkSlots + i; }
        listed += __shfl_sync(~0u, before + of_chunk, kWarp - 1);
    }
    return listed;
}

// Log2 of a number, rounded down.
CUTLASS_DEVICE int log2_of(int number) { return 31 - __clz(number); }

// The largest power of two that is not above a number.
CUTLASS_DEVICE int power_of_two(int number) { return 1 << log2_of(number); }

// What a thread puts together: items, four numbers each that lie side by side, of some of the parts.
struct Share {
    int first;     // item; the next is kCombineThreads further
    int end;       // of the thread block's items
    int rounds;    // until each thread has had all of its items
    int together;  // threads that have different items, a group; groups take parts by turns
    int group;     // this thread's; there may be threads behind the last one
    int groups;    // 1 where there are several rounds

    CUTLASS_DEVICE Share(int items, int chunk, int sharers) {
        int const thread = threadIdx.x;
        int const of_block = chunk < sharers ? items / sharers : 0;
        rounds = ceil_div(of_block, kCombineThreads);
        together = of_block > 0 ? min(of_block, kCombineThreads) : kCombineThreads;
        group = thread / together;
        groups = power_of_two(kCombineThreads / together);
        end = (chunk + 1) * of_block;
        first = group < groups ? end - of_block + thread % together : end;
    }
};

template <class Config>
__global__ void __launch_bounds__(kCombineThreads, kCombineBlocks) combine_kernel(__grid_constant__ KernelParams const params) {
    using Element = typename Config::Element;
    extern __shared__ __align__(1024) uint8_t memory[];
    auto& shared = *reinterpret_cast<CombineStorage*>(memory);
    DecodeParams const& call = params.call;
    Workspace const& workspace = params.workspace;
    auto const [chunk, pair, row, kv_head] = ChunkOfHead(params, blockIdx.x);
    int const warp = threadIdx.x / kWarp;
    int const lane = threadIdx.x % kWarp;
    int const heads = workspace.heads;
    int const* const places = shared.places;
    float* const weights = reinterpret_cast<float*>(shared.places + workspace.chunks * kChunkSlots);
    RowOptions const options(call, row);
    int const chunks = ceil_div(options.blocks(), kChunkBlocks);
    int const sharers = min(kSharers, power_of_two(max(1, chunks)));

    // Warps share the words of the state, each some that are next to each other, and a lane one of them.
    constexpr int kWordsAtOnce = kChunkWords / kCombineWarps;
    int const of_chunk = options.tracked ? blocks_of_chunk(options.blocks(), chunk) : 0;
    int const words = ceil_div(max(0, of_chunk), kWordBlocks);
    int const words_of_warp = ceil_div(words, kCombineWarps);
    int const word_of_chunk = warp * words_of_warp;
    int const first_word = chunk * kChunkWords + word_of_chunk;
    bool const exists = lane < words_of_warp && word_of_chunk + lane < words;
    int32_t* const mask = words_of_mask(call, row, kv_head) + first_word + lane;
    uint32_t const before = exists ? *mask : 0;
    cudaGridDependencySynchronize();  // everything is attended to
    if (chunk >= sharers && of_chunk <= 0) { return; }

    uint32_t visits = 0;
    if (exists) {
        int const missing = max(0, (first_word + lane + 1) * kWordBlocks - options.blocks());  // of the word's blocks
        visits = options.everything ? ~0u >> missing : workspace.visited[pair * workspace.words + first_word + lane];
    }
    if (warp == 0) {
        int const listed = list_places(shared.places, chunks, [&](int i) {
            int const blocks = blocks_of_chunk(options.blocks(), i);
            if (options.everything) { return parts_of_all(blocks); }
            int64_t const list = pair * workspace.chunks + i;
            return parts_of(workspace.known[list], blocks) + parts_of(workspace.found[list], blocks);
        });
        if (lane == 0) { shared.parts = listed; }
    }
    __syncthreads();
    int const parts = shared.parts;

    // Each part takes long to come, so several are asked for at once, the first of them before it is known what they weigh.
    constexpr int kAtOnce = 4;
    int const heads_log2 = log2_of(heads);
    int const items = call.head_dim * heads / 4;
    Share const share(items, chunk, sharers);
    float4 const* const outs = reinterpret_cast<float4 const*>(workspace.out) + pair * workspace.slots * items;
    float4 values[kAtOnce];
    auto const load = [&](int item, int first) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
            int const part = first + i * share.groups;
            values[i] = item < share.end && part < parts ? outs[places[part] * items + item] : float4{};
        }
    };
    load(share.first, share.group);

    LogSum sum;
    float const* const lses = workspace.lse + pair * workspace.slots * heads;
#pragma unroll 1
    for (int i = threadIdx.x; i < parts * heads; i += kCombineThreads) {
        weights[i] = lses[(places[i >> heads_log2] << heads_log2) + (i & (heads - 1))];
        sum.add(weights[i]);
    }
    sum.join_lanes(heads, kWarp);
    if (lane < heads) { shared.lse[warp][lane] = sum; }
    __syncthreads();
    sum = {};
#pragma unroll 1
    for (int w = lane >> heads_log2; w < kCombineWarps; w += kWarp >> heads_log2) { sum.join(shared.lse[w][lane & (heads - 1)]); }
    sum.join_lanes(heads, kWarp);
    float const lse = sum.log2();  // of the query head lane % heads, which a thread has weights of, too
    if (chunk == 0 && threadIdx.x < params.group) {
        call.lse[static_cast<int64_t>(row) * call.heads + kv_head * params.group + threadIdx.x] = lse * kLn2;
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < parts * heads; i += kCombineThreads) { weights[i] = exp2f(weights[i] - lse); }
    __syncthreads();

    static_assert(kCombineThreads % kMaxGroup == 0);
    int const head = share.first * 4 & (heads - 1);  // of the first number of each of this thread's items
#pragma unroll 1
    for (int round = 0; round < share.rounds; ++round) {
        int const item = share.first + round * kCombineThreads;
        float value[4] = {};
#pragma unroll 1
        for (int first = share.group; first < parts; first += kAtOnce * share.groups) {
            if (round > 0 || first != share.group) { load(item, first); }
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < kAtOnce; ++i) {
                int const part = first + i * share.groups;
                if (part < parts) {
                    float const* const of_part = weights + part * heads + head;
                    float2 const low{of_part[0], of_part[1]};
                    float2 const high = heads > 2 ? float2{of_part[2], of_part[3]} : low;
                    value[0] += low.x * values[i].x;
                    value[1] += low.y * values[i].y;
                    value[2] += high.x * values[i].z;
                    value[3] += high.y * values[i].w;
                }
            }
        }
        if (share.groups > 1) {
            shared.sums[threadIdx.x] = {value[0], value[1], value[2], value[3]};
            __syncthreads();
            CUTLASS_PRAGMA_UNROLL
            for (int k = 0; k < 4; ++k) { value[k] = 0.0f; }
#pragma unroll 1
            for (int i = threadIdx.x; i < share.groups * share.together; i += share.together) {
                float4 const addend = shared.sums[i];
                value[0] += addend.x;
                value[1] += addend.y;
                value[2] += addend.z;
                value[3] += addend.w;
            }
        }
        if (share.group == 0 && item < share.end) {
            Element* const out = static_cast<Element*>(call.out) + row * call.out_row_stride;
            CUTLASS_PRAGMA_UNROLL
            for (int k = 0; k < 4; ++k) {
                int const of_head = head + k & (heads - 1);
                int const channel = item * 4 + k >> heads_log2;
                if (of_head < params.group) {
                    out[(kv_head * params.group + of_head) * call.out_head_stride + channel] = static_cast<Element>(value[k]);
                }
            }
        }
    }

    // The bits of what was visited: whether the share of a query head was above the threshold.
    float const* const masses = workspace.masses + (pair * workspace.words + first_word) * kWordBlocks * heads;
    float const limit = (lane & (heads - 1)) < params.group ? options.threshold + lse : INFINITY;
    bool keeps[kWordsAtOnce] = {};
#pragma unroll 1
    for (int head = 0; head < heads; head += 2) {
        float const low = __shfl_sync(~0u, limit, head);
        float const high = __shfl_sync(~0u, limit, head + 1);
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kWordsAtOnce; ++i) {
            bool const is_visited = __shfl_sync(~0u, visits, i) >> lane & 1;
            int const block = i * kWordBlocks + lane;
            float2 const none{-INFINITY, -INFINITY};
            float2 const mass = is_visited ? *reinterpret_cast<float2 const*>(masses + block * heads + head) : none;
            keeps[i] |= mass.x > low || mass.y > high;
        }
    }
    uint32_t kept = 0;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kWordsAtOnce; ++i) {
        uint32_t const of_word = __ballot_sync(~0u, keeps[i]);
        if (lane == i) { kept = of_word; }
    }
    if (exists) { *mask = (before & ~visits) | kept; }
}

}  // namespace lite_attention::sm90
