// SPDX-License-Identifier: MIT
// What the blocks of a unit weigh, by their summaries: these are fetched as keys are, and each consumer estimates groups of 16 blocks.
// Whoever plans what the sequence's key head visits waits for all of it.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "storage.h"

namespace lite_attention::sm90 {

// Of `spread`; see lite_attention/reference.py.
constexpr float kExpectedBend = 4.0f;
constexpr float kGenerousBend = 8.0f;

// Asks for the summaries of a unit's blocks, a group in each use of the stages from `fetched` on. Runs in a warp. One lane asks for
// all: lanes that ask each for their own take turns, which takes several times as long.
template <class Config>
CUTLASS_DEVICE void fetch_summaries(
    DecodeParams const& call, SharedStorage<Config>& shared, Unit<Config> const& unit, uint32_t fetched) {
    int const lane = threadIdx.x % kWarp;
    int const blocks_of_page = call.page_size / kDecodeBlock;
    int const bytes = 3 * call.head_dim + 16;
    int const blocks = unit.blocks;
#pragma unroll 1
    for (int first = 0; first < blocks; first += kGroupBlocks) {
        int const count = min(blocks - first, kGroupBlocks);
        int const own = first + min(lane, count - 1);
        uint8_t const* const summary = call.summaries.data + unit.page[own] * call.summaries.page_stride +
                                       unit.kv_head * call.summaries.head_stride +
                                       (unit.first_block + own) % blocks_of_page * call.summaries.block_stride;
        uint32_t const use = fetched + first / kGroupBlocks;
        Stage<Config>& stage = shared.stage[shared.stages.place(use)];
        uint64_t* const full = &shared.stages.full[shared.stages.place(use)];
        shared.stages.wait_empty(use);
        __syncwarp();
        bool const asks = cute::elect_one_sync();
        if (asks) { CopyBarrier::arrive_and_expect_tx(full, count * bytes); }
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kGroupBlocks; ++i) {
            auto const* const from =
                reinterpret_cast<uint8_t const*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(summary), i));
            if (asks && i < count) { cute::SM90_BULK_COPY_G2S::copy(from, full, stage.summaries().row[i], bytes); }
        }
    }
}

// Notes what each block of a unit may weigh, and what all of them together probably do. Runs in the consumers. `n`: units that this
// thread block has estimated before. `fetched`: uses of the stages before this unit.
template <class Config>
CUTLASS_DEVICE void estimate(
    KernelParams const& params, SharedStorage<Config>& shared, Unit<Config> const& unit, uint32_t n, uint32_t fetched, int warp) {
    using Element = typename Config::Element;
    DecodeParams const& call = params.call;
    Workspace const& workspace = params.workspace;
    int const heads = workspace.heads;
    int const lane = threadIdx.x % kWarp;
    int const blocks_of_page = call.page_size / kDecodeBlock;
    int const blocks = ceil_div(unit.length, kDecodeBlock);  // of the row
    int const end = unit.first_block + unit.blocks;
    int const groups = ceil_div(unit.blocks, kGroupBlocks);
    int64_t const pair = static_cast<int64_t>(unit.row) * call.kv_heads + unit.kv_head;
    float* const masses = workspace.masses + pair * workspace.words * kWordBlocks * heads;
    // The sums of every other unit, so that only one warp is late for the next.
    auto& sums = shared.expected[n % 2];

#pragma unroll 1
    for (int tile = 0; tile < Config::kHeadTiles; ++tile) {
        Element const* const tile_query = unit.query + tile * kHeadTile * Config::kQueryRow;
        ScoringQuery<Config> const query(tile_query);
        int const head = tile * kHeadTile + lane % 4 * 2;  // this thread's: this one and the next
        LogSum sum[2];                                     // of this thread's blocks
#pragma unroll 1
        for (int group = warp; group < groups; group += kConsumers) {
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
