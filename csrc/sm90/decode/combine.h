// SPDX-License-Identifier: MIT
// The third kernel of a decode step: a thread block for each sequence and key head puts the segments together, in their order,
// and notes in the state which blocks mattered.
#pragma once

#include "kernel.h"

namespace lite_attention::sm90 {

// Sets the bits of the blocks that were visited: whether the share of a query head was above the threshold. The number of
// blocks that this warp saw visited. `lse`: of the query heads, in log2 units.
CUTLASS_DEVICE int update_mask(
    int32_t* mask, uint32_t const* visited, float const* masses, float const* lse, int words, int group, float threshold) {
    int const lane = threadIdx.x % kWarp;
    // Several words at a time: each takes long to come.
    constexpr int kAtOnce = 4;
    int count = 0;
    for (int first = threadIdx.x / kWarp * kAtOnce; first < words; first += kCombiners * kAtOnce) {
        uint32_t visits[kAtOnce];
        uint32_t before[kAtOnce];
        bool keeps[kAtOnce] = {};
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
            visits[i] = first + i < words ? visited[first + i] : 0;
            before[i] = first + i < words ? mask[first + i] : 0;
        }
        for (int head = 0; head < group; ++head) {
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < kAtOnce; ++i) {
                if (visits[i] >> lane & 1) {
                    int const block = (first + i) * kWordBlocks + lane;
                    keeps[i] |= masses[static_cast<int64_t>(block) * group + head] - lse[head] > threshold;
                }
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

template <class Element>
__global__ void __launch_bounds__(kCombiners * kWarp) combine_kernel(__grid_constant__ KernelParams const params) {
    __shared__ float shared_lse[kMaxGroup];
    DecodeParams const& call = params.call;
    Workspace const& workspace = params.workspace;
    int const group = params.group;
    int const kv_head = blockIdx.x;
    int const row = blockIdx.y;
    int const thread = threadIdx.x;
    int const lane = thread % kWarp;
    int const length = max(0, call.seq_lens[row]);
    float const threshold = call.thresholds[row];
    int const slot = call.slots[row];
    bool const tracked = threshold != -INFINITY && length > 0;
    int const segments = segments_of(length);
    int64_t const pair = static_cast<int64_t>(row) * call.kv_heads + kv_head;
    float const* const lses = workspace.lse + pair * workspace.segments * group;
    cudaGridDependencySynchronize();
    if (row == 0 && kv_head == 0 && thread == 0) { *workspace.drawn = 0; }

    for (int head = thread / kWarp; head < group; head += kCombiners) {
        float largest = -INFINITY;
        for (int i = lane; i < segments; i += kWarp) { largest = fmaxf(largest, lses[i * group + head]); }
        largest = join_lanes(largest, fmaxf);
        float const offset = largest == -INFINITY ? 0.0f : largest;
        float sum = 0.0f;
        for (int i = lane; i < segments; i += kWarp) { sum += exp2f(lses[i * group + head] - offset); }
        float const lse = offset + log2f(join_lanes(sum, add));
        if (lane == 0) {
            shared_lse[head] = lse;
            call.lse[static_cast<int64_t>(row) * call.heads + kv_head * group + head] = lse * kLn2;
        }
    }
    __syncthreads();

    int const items = call.head_dim * group;
    float const* const outs = workspace.out + pair * workspace.segments * items;
    Element* const out =
        static_cast<Element*>(call.out) + row * call.out_row_stride + kv_head * group * call.out_head_stride;
    for (int item = thread; item < items; item += kCombiners * kWarp) {
        int const head = item % group;
        float const lse = shared_lse[head];
        float sum = 0.0f;
#pragma unroll 8
        for (int i = 0; i < segments; ++i) {
            float const of_segment = lses[i * group + head];
            float const part = outs[static_cast<int64_t>(i) * items + item];
            sum += of_segment == -INFINITY ? 0.0f : exp2f(of_segment - lse) * part;
        }
        out[head * call.out_head_stride + item / group] = static_cast<Element>(sum);
    }

    int const blocks = ceil_div(length, kDecodeBlock);
    int visited = thread == 0 ? blocks : 0;
    if (tracked) {
        visited = update_mask(
            call.mask + slot * call.mask_slot_stride + kv_head * call.mask_head_stride,
            workspace.visited + pair * workspace.words, workspace.masses + pair * workspace.words * kWordBlocks * group,
            shared_lse, ceil_div(blocks, kWordBlocks), group, threshold);
    }
    if (lane == 0 && visited > 0) { atomicAdd(&call.visited[row], visited); }
}

}  // namespace lite_attention::sm90
