// SPDX-License-Identifier: MIT
// What the blocks of a unit weigh, by their summaries: each consumer brings those of groups of 16 blocks to stages that it is given,
// and estimates them. Whoever plans what the sequence's key head visits waits for all of it.
#pragma once

#include <cute/arch/copy_sm80.hpp>

#include "storage.h"

namespace lite_attention::sm90 {

// Of `spread`; see lite_attention/reference.py.
constexpr float kExpectedBend = 4.0f;
constexpr float kGenerousBend = 8.0f;

// Has a warp's lanes copy 16 bytes each. Summaries are too small for the copy engine: a multiprocessor has it begin a copy every 30 ns.
CUTLASS_DEVICE void copy_piece(void* to, uint64_t from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(cute::cast_smem_ptr_to_uint(to)), "l"(from) : "memory");
}

// Gives a unit's stages to the consumers, one for each group of blocks. `fetched`: uses of the stages before this unit. Runs in a warp.
template <class Config>
CUTLASS_DEVICE void give_stages(SharedStorage<Config>& shared, int groups, uint32_t fetched) {
    int const lane = threadIdx.x % kWarp;
    for (int first = 0; first < groups; first += kConsumers) {
        if (lane < min(kConsumers, groups - first)) {
            uint32_t const use = fetched + first + lane;
            shared.stages.wait_empty(use);
            Barrier::arrive(&shared.stages.full[shared.stages.place(use)]);
        }
        // No lane may wait for a stage that another has yet to give the time before.
        __syncwarp();
    }
}

// The summaries that a consumer brings to its stages, at most one group ahead of the one that it estimates.
template <class Config>
class SummaryCopies {
  public:
    // Whether a group may be asked for while its unit, or the one before, is worked on: only where no stage that is used in the meantime
    // is another warp's, since nothing may be waited for whose use before the last goes on.
    static constexpr bool kAhead = Config::kStages >= kUnitGroups + kConsumers;

    CUTLASS_DEVICE SummaryCopies(DecodeParams const& call, SharedStorage<Config>& shared, int warp)
        : call_(call), shared_(shared), warp_(warp) {}

    // Asks for a group of a unit unless it is on its way already. `fetched`: uses of the stages before the unit.
    CUTLASS_DEVICE void ask(Unit<Config> const& unit, int group, uint32_t fetched) {
        int const first = group * kGroupBlocks;
        int const count = min(unit.blocks - first, kGroupBlocks);
        if (asked_ || count <= 0) { return; }
        asked_ = true;
        int const lane = threadIdx.x % kWarp;
        int const blocks_of_page = call_.page_size / kDecodeBlock;
        int const own = first + min(lane, count - 1);
        auto const of_lane = reinterpret_cast<uint64_t>(
            call_.summaries.data + unit.page[own] * call_.summaries.page_stride + unit.kv_head * call_.summaries.head_stride +
            (unit.first_block + own) % blocks_of_page * call_.summaries.block_stride);
        shared_.stages.wait_full(fetched + group);
        uint8_t* const to = shared_.stage[shared_.stages.place(fetched + group)].summaries().row[0] + lane * kPiece;
        int const pieces = 3 * call_.head_dim / kPiece + 1;
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kGroupBlocks; ++i) {
            uint64_t const from = __shfl_sync(~0u, of_lane, i) + lane * kPiece;
            CUTLASS_PRAGMA_UNROLL
            for (int piece = 0; piece * kPiece < Summaries<Config>::kRowBytes; piece += kWarp) {
                if (i < count && piece + lane < pieces) {
                    copy_piece(to + i * Summaries<Config>::kRowBytes + piece * kPiece, from + piece * kPiece);
                }
            }
        }
        cute::cp_async_fence();
    }

    // Asks for the first group of the thread block's n-th unit if this is listed already, and to be estimated.
    CUTLASS_DEVICE void ask_first(uint32_t n, uint32_t fetched) {
        if (!__all_sync(~0u, shared_.units.is_full(n))) { return; }
        Unit<Config> const& unit = shared_.unit[shared_.units.place(n)];
        if (unit.row >= 0 && unit.estimated) { ask(unit, warp_, fetched); }
    }

    // Before what comes next is asked for: the group of which `wait` is to see the end is the last one asked for.
    CUTLASS_DEVICE void take() { asked_ = false; }

    // Until the group that was taken is there.
    CUTLASS_DEVICE void wait() const {
        if (asked_) {
            cute::cp_async_wait<1>();
        } else {
            cute::cp_async_wait<0>();
        }
        __syncwarp();
    }

  private:
    static constexpr int kPiece = 16;  // bytes

    DecodeParams const& call_;
    SharedStorage<Config>& shared_;
    int warp_;
    bool asked_ = false;  // whether a group is on its way that was not taken yet
};

// Notes what each block of a unit may weigh, and what all of them together probably do. Runs in the consumers. `n`: number of the
// thread block's unit. `estimates`: units that it has estimated before. `fetched`: uses of the stages before this unit.
template <class Config>
CUTLASS_DEVICE void estimate(
    KernelParams const& params, SharedStorage<Config>& shared, SummaryCopies<Config>& copies, Unit<Config> const& unit, uint32_t n,
    uint32_t estimates, uint32_t fetched, int warp) {
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
    auto& sums = shared.expected[estimates % 2];

#pragma unroll 1
    for (int group = warp; group < groups; group += kConsumers) {
        copies.ask(unit, group, fetched);
        copies.take();
        if constexpr (SummaryCopies<Config>::kAhead) {
            if (group + kConsumers < groups) {
                copies.ask(unit, group + kConsumers, fetched);
            } else {
                copies.ask_first(n + 1, fetched + groups);
            }
        }
        int const first = unit.first_block + group * kGroupBlocks;
        int const low = first + lane / 4;  // this thread's blocks: this one and 8 further
        int const place = shared.stages.place(fetched + group);
#pragma unroll 1
        for (int tile = 0; tile < Config::kHeadTiles; ++tile) {
            Element const* const tile_query = unit.query + tile * kHeadTile * Config::kQueryRow;
            ScoringQuery<Config> const query(tile_query);
            int const head = tile * kHeadTile + lane % 4 * 2;  // this thread's: this one and the next
            LogSum sum[2];                                     // of this thread's blocks
            bool exact[2] = {};                                // whether they are in the sum already
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

            copies.wait();
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
            sum[0].join_lanes(4, kWarp);
            sum[1].join_lanes(4, kWarp);
            if (lane < 4) { *reinterpret_cast<float2*>(&sums[group][head]) = {sum[0].log2(), sum[1].log2()}; }
        }
        // The copy engine writes there next.
        cutlass::arch::fence_view_async_shared();
        __syncwarp();
        if (lane == 0) { Barrier::arrive(&shared.stages.empty[place]); }
    }
    float* const expected = workspace.expected + (pair * workspace.segments + unit.number) * heads;
    sync_consumers();
    leave(shared, unit);
    if (warp != estimates % kConsumers) { return; }
    float const sum = sum_parts(sums[0], groups, Config::kHeads);
    if (lane < heads) { expected[lane] = sum; }
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
