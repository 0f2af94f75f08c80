// SPDX-License-Identifier: MIT
// What the blocks of a unit weigh, by their summaries: a planner has these fetched, and each consumer estimates groups of 16 blocks.
// Whoever plans what the sequence's key head visits waits for all of it.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "storage.h"

namespace lite_attention::sm90 {

// Of `spread`; see lite_attention/reference.py.
constexpr float kExpectedBend = 4.0f;
constexpr float kGenerousBend = 8.0f;

// Asks for the summaries of the n-th unit of a thread block. All units before it are estimated too, and each has kUnitGroups uses
// of the stages, whether there are so many groups or not. Runs in a warp. `blocks`: of the unit.
template <class Config>
CUTLASS_DEVICE void request_summaries(
    DecodeParams const& call, SharedStorage<Config>& shared, uint32_t n, Unit<Config> const& unit, int blocks) {
    int const lane = threadIdx.x % kWarp;
    int const blocks_of_page = call.page_size / kDecodeBlock;
    int const bytes = 3 * call.head_dim + 16;
    // No stage may be waited for while its use before the last goes on. Where stages are few, later units wait.
    constexpr int kAhead = 2 * Config::kStages / kUnitGroups;
    static_assert(kAhead > 0);
    if constexpr (kAhead < Config::kPlanners) { shared.units.wait_empty(n + Config::kPlanners - kAhead); }
    static_assert(kUnitBlocks % kWarp == 0 && kWarp % kGroupBlocks == 0);
#pragma unroll 1
    for (int block = lane; block < kUnitBlocks; block += kWarp) {
        uint32_t const use = n * kUnitGroups + block / kGroupBlocks;
        Stage<Config>& stage = shared.stage[shared.stages.place(use)];
        uint64_t* const full = &shared.stages.full[shared.stages.place(use)];
        shared.stages.wait_empty(use);
        if (lane % kGroupBlocks == 0) {
            CopyBarrier::arrive_and_expect_tx(full, min(max(blocks - block, 0), kGroupBlocks) * bytes);
        }
        __syncwarp();
        if (block < blocks) {
            uint8_t const* const summary = call.summaries.data + unit.page[block] * call.summaries.page_stride +
                                           unit.kv_head * call.summaries.head_stride +
                                           (unit.first_block + block) % blocks_of_page * call.summaries.block_stride;
            cute::SM90_BULK_COPY_G2S::copy(summary, full, stage.summaries().row[block % kGroupBlocks], bytes);
        }
    }
    __syncwarp();
    if (lane == 0) { atomicAdd(&shared.requested, 1); }
}

// Notes what each block of a unit may weigh, and what all of them together probably do. Runs in the consumers. `fetched`: uses of
// the stages before this unit.
template <class Config>
CUTLASS_DEVICE void estimate(
    KernelParams const& params, SharedStorage<Config>& shared, Unit<Config> const& unit, uint32_t fetched, int warp) {
    using Element = typename Config::Element;
    DecodeParams const& call = params.call;
    Workspace const& workspace = params.workspace;
    int const heads = workspace.heads;
    int const lane = threadIdx.x % kWarp;
    int const blocks_of_page = call.page_size / kDecodeBlock;
    int const blocks = ceil_div(unit.length, kDecodeBlock);  // of the row
    int const end = min(blocks, unit.first_block + kUnitBlocks);
    int64_t const pair = static_cast<int64_t>(unit.row) * call.kv_heads + unit.kv_head;
    float* const masses = workspace.masses + pair * workspace.words * kWordBlocks * heads;
    // The sums of every other unit, so that only one warp is late for the next.
    uint32_t const n = fetched / kUnitGroups;
    auto& sums = shared.expected[n % 2];

#pragma unroll 1
    for (int tile = 0; tile < Config::kHeadTiles; ++tile) {
        Element const* const tile_query = unit.query + tile * kHeadTile * Config::kQueryRow;
        ScoringQuery<Config> const query(tile_query);
        int const head = tile * kHeadTile + lane % 4 * 2;  // this thread's: this one and the next
        LogSum sum[2];                                     // of this thread's blocks
#pragma unroll 1
        for (int group = warp; group < kUnitGroups; group += kConsumers) {
            int const first = unit.first_block + group * kGroupBlocks;
            int const low = first + lane / 4;  // this thread's blocks: this one and 8 further
            bool exact[2] = {};                // whether they are in the sum already
            // What is visited in any case is weighed exactly. The summaries come meanwhile.
#pragma unroll 1
            for (int i = 0; i < 3; ++i) {
                int const block = i == 0 ? 0 : blocks - i;
                if (block < first || block >= min(end, first + kGroupBlocks)) { continue; }
                auto const* const keys = static_cast<Element const*>(call.key.data) +
                                         unit.page[block - unit.first_block] * call.key.page_stride +
                                         block % blocks_of_page * kDecodeBlock * call.key.token_stride +
                                         unit.kv_head * call.key.head_stride;
                int const count = min(kDecodeBlock, unit.length - block * kDecodeBlock);
                float2 const mass =
                    exact_mass<Config>(keys, call.key.token_stride, count, tile_query, call.head_dim, params.scale_log2);
                CUTLASS_PRAGMA_UNROLL
                for (int half = 0; half < 2; ++half) {
                    if (block != low + half * 8 || exact[half]) { continue; }
                    exact[half] = true;
                    sum[0].add(mass.x);
                    sum[1].add(mass.y);
                }
            }

            shared.stages.wait_full(fetched + group);
            int const place = shared.stages.place(fetched + group);
            if (first < end) {
                Moments const moments = shared.stage[place].summaries().moments(query, params.scale_log2, call.head_dim);
                CUTLASS_PRAGMA_UNROLL
                for (int half = 0; half < 2; ++half) {
                    int const block = low + half * 8;
                    if (block >= end) { continue; }
                    float may_be[2];
                    CUTLASS_PRAGMA_UNROLL
                    for (int h = 0; h < 2; ++h) {
                        int const k = 2 * half + h;
                        auto mass = [&](float bend) {
                            return log2_of_sum(moments.outlier[k], moments.mean[k] + spread(moments.variance[k], bend));
                        };
                        if (!exact[half]) { sum[h].add(mass(kExpectedBend)); }
                        may_be[h] = mass(kGenerousBend);
                    }
                    if (head < heads) {
                        *reinterpret_cast<float2*>(masses + static_cast<int64_t>(block) * heads + head) = {may_be[0], may_be[1]};
                    }
                }
            }
            __syncwarp();
            if (tile + 1 == Config::kHeadTiles && lane == 0) { Barrier::arrive(&shared.stages.empty[place]); }
        }
        sum[0].join_lanes(4, kWarp);
        sum[1].join_lanes(4, kWarp);
        if (lane < 4) { *reinterpret_cast<float2*>(&sums[warp][head]) = {sum[0].log2(), sum[1].log2()}; }
    }
    float* const expected = workspace.expected + (pair * workspace.segments + unit.number) * heads;
    sync_consumers();
    leave(shared, unit);
    if (warp != n % kConsumers) { return; }
    if (lane < heads) {
        LogSum sum;
        CUTLASS_PRAGMA_UNROLL
        for (int w = 0; w < kConsumers; ++w) { sum.add(sums[w][lane]); }
        expected[lane] = sum.log2();
    }
    __syncwarp();
    if (lane == 0) {
        asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(workspace.estimated + pair) : "memory");
    }
}

// Waits until all of that key head's units are estimated.
CUTLASS_DEVICE void await_estimates(Workspace const& workspace, Place const& place) {
    uint32_t const units = place.units();
    uint32_t estimated;
    do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(estimated) : "l"(workspace.estimated + place.pair) : "memory");
    } while (estimated < units);
}

}  // namespace lite_attention::sm90
