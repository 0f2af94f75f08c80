// SPDX-License-Identifier: MIT
// The end of a row's key head: whoever attends to its last part puts all of them together, in their order, and notes in the state
// which blocks mattered. Runs in the consumers.
#pragma once

#include "storage.h"

namespace lite_attention::sm90 {

// Sets the bits of the blocks that were visited: whether the share of a query head was above the threshold.
//
//   visited  a bit for each block; null: all are
//   lse      of the query head lane % heads, in log2 units
template <class Config>
CUTLASS_DEVICE void update_mask(
    int32_t* mask, uint32_t const* visited, float const* masses, float lse, int blocks, int group, int heads, float threshold) {
    int const words = ceil_div(blocks, kWordBlocks);
    int const lane = threadIdx.x % kWarp;
    float const limit = lane % heads < group ? threshold + lse : INFINITY;
    // A lane has a word. The masses of several words are read at a time: each takes long to come.
    constexpr int kAtOnce = 8;
    int const share = min(kWarp, ceil_div(words, Config::kConsumers));
    for (int first = threadIdx.x / kWarp % Config::kConsumers * share; first < words; first += Config::kConsumers * share) {
        bool const exists = lane < min(share, words - first);
        uint32_t visits = 0;
        if (exists) {
            int const missing = max(0, (first + lane + 1) * kWordBlocks - blocks);  // of the word's blocks
            visits = visited != nullptr ? visited[first + lane] : ~0u >> missing;
        }
        uint32_t const before = exists ? mask[first + lane] : 0;
        uint32_t kept = 0;
        for (int word = 0; word < share; word += kAtOnce) {
            bool keeps[kAtOnce] = {};
#pragma unroll 2
            for (int head = 0; head < heads; head += 2) {
                float const low = __shfl_sync(~0u, limit, head);
                float const high = __shfl_sync(~0u, limit, head + 1);
                CUTLASS_PRAGMA_UNROLL
                for (int i = 0; i < kAtOnce; ++i) {
                    bool const is_visited = word + i < share && __shfl_sync(~0u, visits, word + i) >> lane & 1;
                    int64_t const block = static_cast<int64_t>(first + word + i) * kWordBlocks + lane;
                    float2 const none{-INFINITY, -INFINITY};
                    float2 const mass = is_visited ? *reinterpret_cast<float2 const*>(masses + block * heads + head) : none;
                    keeps[i] |= mass.x > low || mass.y > high;
                }
            }
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < kAtOnce; ++i) {
                uint32_t const of_word = __ballot_sync(~0u, keeps[i]);
                if (lane == word + i) { kept = of_word; }
            }
        }
        if (exists) { mask[first + lane] = (before & ~visits) | kept; }
    }
}

// Puts together the parts of the row's key head of which this was the last.
template <class Config>
CUTLASS_DEVICE void combine(KernelParams const& params, Part const& ended, int thread) {
    using Element = typename Config::Element;
    constexpr int kThreads = Config::kConsumers * kWarp;
    DecodeParams const& call = params.call;
    Workspace const& workspace = params.workspace;
    int const group = params.group;
    int const heads = workspace.heads;
    int const lane = thread % kWarp;
    int64_t const pair = static_cast<int64_t>(ended.row) * call.kv_heads + ended.kv_head;
    int const slot = call.slots[ended.row];
    float const threshold = call.thresholds[ended.row];
    __threadfence();  // what other thread blocks have left is read
    float const* const lses = workspace.lse + pair * workspace.segments * heads;
    float const lse = sum_parts(lses, ended.parts, heads);
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
    // Many parts at a time: each takes long to come.
    constexpr int kAtOnce = 16;
    for (int item = thread; item < items; item += kThreads) {
        float2 sum{};
        for (int first = 0; first < ended.parts; first += kAtOnce) {
            float2 of_part[kAtOnce];
            float2 part[kAtOnce];
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < kAtOnce; ++i) {
                bool const exists = first + i < ended.parts;
                float2 const none{-INFINITY, -INFINITY};
                of_part[i] = exists ? *reinterpret_cast<float2 const*>(lses + (first + i) * heads + head) : none;
                part[i] = exists ? parts[static_cast<int64_t>(first + i) * items + item] : float2{};
            }
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < kAtOnce; ++i) {
                // A part of which nothing was visited has left nothing.
                sum.x += of_part[i].x == -INFINITY ? 0.0f : exp2f(of_part[i].x - lse_of_heads.x) * part[i].x;
                sum.y += of_part[i].y == -INFINITY ? 0.0f : exp2f(of_part[i].y - lse_of_heads.y) * part[i].y;
            }
        }
        int const channel = item / head_pairs;
        if (head < group) { out[channel] = static_cast<Element>(sum.x); }
        if (head + 1 < group) { out[call.out_head_stride + channel] = static_cast<Element>(sum.y); }
    }

    if (ended.tracked) {
        int const blocks = ceil_div(ended.length, kDecodeBlock);
        update_mask<Config>(
            call.mask + slot * call.mask_slot_stride + ended.kv_head * call.mask_head_stride,
            ended.visits < blocks ? workspace.visited + pair * workspace.words : nullptr,
            workspace.masses + pair * workspace.words * kWordBlocks * heads, lse, blocks, group, heads,
            threshold);
    }
    if (thread == 0) { atomicAdd(&call.visited[ended.row], ended.visits); }
}

// Counts a part that a warp has left in the workspace, or several warps before they waited for each other. How many of its row's
// key head were counted before: who uses the number waits for it.
CUTLASS_DEVICE uint32_t count_part(KernelParams const& params, int64_t pair) {
    cudaGridDependencySynchronize();  // the counter is zero
    uint32_t before;
    asm volatile("atom.add.release.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(params.workspace.ended + pair) : "memory");
    return before;
}

}  // namespace lite_attention::sm90
