// SPDX-License-Identifier: MIT
// The end of a sequence's key head: the thread block that attends to its last unit puts all of them together, in their order, and
// notes in the state which blocks mattered. Runs in the consumers, but for the count, which takes long: a planner waits for it.
#pragma once

#include "storage.h"

namespace lite_attention::sm90 {

// Sets the bits of the blocks that were visited: whether the share of a query head was above the threshold. The number of
// blocks that this warp saw visited. `lse`: of the query head lane % heads, in log2 units.
template <class Config>
CUTLASS_DEVICE int update_mask(
    int32_t* mask, uint32_t const* visited, float const* masses, float lse, int words, int group, int heads, float threshold) {
    int const lane = threadIdx.x % kWarp;
    float const limit = lane % heads < group ? threshold + lse : INFINITY;
    // Several words at a time: each takes long to come.
    constexpr int kAtOnce = 8;
    int count = 0;
    for (int first = threadIdx.x / kWarp % Config::kConsumers * kAtOnce; first < words; first += Config::kConsumers * kAtOnce) {
        uint32_t visits[kAtOnce];
        uint32_t before[kAtOnce];
        bool keeps[kAtOnce] = {};
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
            visits[i] = first + i < words ? visited[first + i] : 0;
            before[i] = first + i < words ? mask[first + i] : 0;
        }
#pragma unroll 2
        for (int head = 0; head < heads; head += 2) {
            float const low = __shfl_sync(~0u, limit, head);
            float const high = __shfl_sync(~0u, limit, head + 1);
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < kAtOnce; ++i) {
                bool const visited_here = visits[i] >> lane & 1;
                int64_t const block = visited_here ? (first + i) * kWordBlocks + lane : 0;
                float2 const mass = *reinterpret_cast<float2 const*>(masses + block * heads + head);
                keeps[i] |= visited_here && (mass.x > low || mass.y > high);
            }
        }
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
            uint32_t const kept = __ballot_sync(~0u, keeps[i]);
            if (lane == 0 && first + i < words) { mask[first + i] = (before[i] & ~visits[i]) | kept; }
            count += __popc(visits[i]);
        }
    }
    return count;
}

// Puts together the units of a sequence's key head.
template <class Config>
CUTLASS_DEVICE void combine(KernelParams const& params, Pair const& ended, int thread) {
    using Element = typename Config::Element;
    constexpr int kThreads = Config::kConsumers * kWarp;
    DecodeParams const& call = params.call;
    Workspace const& workspace = params.workspace;
    int const group = params.group;
    int const heads = workspace.heads;
    int const lane = thread % kWarp;
    int64_t const pair = static_cast<int64_t>(ended.row) * call.kv_heads + ended.kv_head;
    __threadfence();  // what other thread blocks have left is read
    float const* const lses = workspace.lse + pair * workspace.segments * heads;
    float const lse = sum_parts(lses, ended.units, heads);
    if (thread < group) { call.lse[static_cast<int64_t>(ended.row) * call.heads + ended.kv_head * group + thread] = lse * kLn2; }

    // A thread has the same pair of heads in all of its channels.
    int const head_pairs = heads / 2;
    static_assert(kThreads % (kMaxGroup / 2) == 0);
    int const head = thread % head_pairs * 2;
    float2 const lse_of_heads{__shfl_sync(~0u, lse, head), __shfl_sync(~0u, lse, head + 1)};
    int const items = call.head_dim * head_pairs;
    auto const* const parts = reinterpret_cast<float2 const*>(workspace.out) + pair * workspace.segments * items;
    Element* const out = static_cast<Element*>(call.out) + ended.row * call.out_row_stride +
                         (ended.kv_head * group + head) * call.out_head_stride;
    for (int item = thread; item < items; item += kThreads) {
        float2 sum{};
#pragma unroll 16
        for (int i = 0; i < ended.units; ++i) {
            float2 const of_unit = *reinterpret_cast<float2 const*>(lses + i * heads + head);
            float2 const part = parts[static_cast<int64_t>(i) * items + item];
            // A unit of which nothing was visited has left nothing.
            sum.x += of_unit.x == -INFINITY ? 0.0f : exp2f(of_unit.x - lse_of_heads.x) * part.x;
            sum.y += of_unit.y == -INFINITY ? 0.0f : exp2f(of_unit.y - lse_of_heads.y) * part.y;
        }
        int const channel = item / head_pairs;
        if (head < group) { out[channel] = static_cast<Element>(sum.x); }
        if (head + 1 < group) { out[call.out_head_stride + channel] = static_cast<Element>(sum.y); }
    }

    int const blocks = ceil_div(ended.length, kDecodeBlock);
    int visited = thread == 0 ? blocks : 0;
    if (ended.tracked) {
        visited = update_mask<Config>(
            call.mask + call.slots[ended.row] * call.mask_slot_stride + ended.kv_head * call.mask_head_stride,
            workspace.visited + pair * workspace.words, workspace.masses + pair * workspace.words * kWordBlocks * heads, lse,
            ceil_div(blocks, kWordBlocks), group, heads, call.thresholds[ended.row]);
    }
    if (lane == 0 && visited > 0) { atomicAdd(&call.visited[ended.row], visited); }
}

// Counts a unit whose consumers have left it to this thread. Whether it was the last of its sequence's key head.
CUTLASS_DEVICE bool count_unit(KernelParams const& params, Pair const& pair) {
    cudaGridDependencySynchronize();  // the counter is zero
    uint32_t* const counter = params.workspace.ended + pair.row * params.call.kv_heads + pair.kv_head;
    uint32_t before;
    asm volatile("atom.add.release.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before == pair.units - 1u;
}

}  // namespace lite_attention::sm90
