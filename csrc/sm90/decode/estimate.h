// SPDX-License-Identifier: MIT
// The second kernel of a decode step: what the blocks of rows that skip weigh, by their summaries. Some warps have these brought,
// in stages of tiles, which are some blocks of a key head; others estimate, each a tile.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "score.h"

namespace lite_attention::sm90 {

// Of `spread`; see lite_attention/reference.py.
constexpr float kExpectedBend = 4.0f;
constexpr float kGenerousBend = 8.0f;

template <class Config>
struct EstimateStorage {
    static constexpr int kSize = Config::kHeadDim * Config::kHeadTiles;
    static constexpr int kWarps = kSize > 384 ? 4 : kSize > 128 ? 8 : 16;  // that estimate
    static constexpr int kTiles = kSize > 128 ? 4 : 8;  // of a stage
    static constexpr int kTeams = kWarps / kTiles;      // take stages by turns
    static constexpr int kFetchers = 4;  // warps: one begins a copy every 43 ns, several one every 22 ns
    static constexpr int kThreads = (kWarps + kFetchers) * kWarp;
    static_assert(kTiles * kTileBlocks <= kFetchers * kWarp);  // a lane has a block
    // With room for the padding that `row_bytes` adds.
    static constexpr int kStageBytes = kTiles * kTileBlocks * (summary_bytes(Config::kHeadDim) + 48);
    // Whether queries stay in registers, which leaves room for another stage, and saves warps a wait.
    static constexpr bool kKept = kSize <= 128;
    using Query = ScoringQuery<Config>[Config::kHeadTiles][kWarp];
    // More bytes under way only get into each other's way in the L2 cache. A stage is always of the same team, which cannot wait
    // for its next use before the last is over.
    static constexpr int kUnderWay = 104 * 1024;
    static constexpr int kStages = kUnderWay / kStageBytes / kTeams * kTeams;
    static_assert(kStages > 0);

    alignas(128) uint8_t summaries[kStages][kStageBytes];
    std::conditional_t<kKept, char, Query> query[kKept ? 1 : kWarps];
    Ring<kStages> stages;
    RowTable rows;
};

// A unit of work, which fills a stage: summaries of key heads that lie side by side, and of blocks that follow one another.
struct SummaryUnit {
    int row = -1;
    int blocks;  // of the row
    int first_block;
    int first_head;

    // Moves on to the unit of that number. `unit_blocks`: of each.
    CUTLASS_DEVICE void go_to(KernelParams const& params, RowTable& rows, int index, int unit_blocks) {
        DecodeParams const& call = params.call;
        if (index >= row_end_) {
            row = row_of(rows.first_unit(), call.rows, index);
            row_end_ = rows.first_unit()[row + 1];
            blocks = rows.shape(call.rows, row).blocks();
            int const number = index - rows.first_unit()[row];
            int const head_sets = call.kv_heads / params.heads_together;
            first_block = number / head_sets * unit_blocks;
            first_head = number % head_sets * params.heads_together;
        } else {
            first_head += (index - index_) * params.heads_together;
            for (; first_head >= call.kv_heads; first_head -= call.kv_heads) { first_block += unit_blocks; }
        }
        index_ = index;
    }

  private:
    int index_;
    int row_end_ = 0;  // of the units
};

// Bytes from a block's summaries to the next one's in shared memory: so the 64 bytes that eight lanes read of two blocks at a time
// lie in banks of their own.
CUTLASS_DEVICE int row_bytes(int summaries_bytes) { return (summaries_bytes + 63) / 128 * 128 + 64; }

// Has summaries brought, those of several heads at a time: what limits is how many copies begin. Runs in kFetchers warps.
template <class Config>
CUTLASS_DEVICE void fetch_summaries(
    KernelParams const& params, EstimateStorage<Config>& shared, int first, int end, int fetcher) {
    using Storage = EstimateStorage<Config>;
    DecodeParams const& call = params.call;
    SummaryView const& summaries = call.summaries;
    int const lane = threadIdx.x % kWarp;
    int const block_of_unit = lane * Storage::kFetchers + fetcher;
    int const unit_blocks = Storage::kTiles / params.heads_together * kTileBlocks;
    int const bytes = params.heads_together * summary_bytes(call.head_dim);

    SummaryUnit unit;
    int block;
    int page;
    auto const go_to = [&](int index) {
        unit.go_to(params, shared.rows, index, unit_blocks);
        block = min(unit.first_block + block_of_unit, unit.blocks - 1);  // what does not exist has the summaries of the row's last
        page = load_kept(call.block_table + unit.row * call.block_table_stride + params.page_blocks.div(block));
    };
    if (first < end) { go_to(first); }
    for (int index = first; index < end; ++index) {
        uint32_t const n = index - first;
        int const stage = shared.stages.place(n);
        uint64_t* const full = &shared.stages.full[stage];
        uint8_t const* const from = summaries.data + page * summaries.page_stride + unit.first_head * summaries.head_stride +
                                    params.page_blocks.rem(block) * summaries.block_stride;
        if (index + 1 < end) { go_to(index + 1); }  // its pages come meanwhile
        shared.stages.wait_empty(n);
        if (lane == 0) { CopyBarrier::arrive_and_expect_tx(full, unit_blocks / Storage::kFetchers * bytes); }
        __syncwarp();
        if (block_of_unit < unit_blocks) {
            cute::SM90_BULK_COPY_G2S::copy(from, full, shared.summaries[stage] + block_of_unit * row_bytes(bytes), bytes);
        }
    }
}

// Notes what each block that is not known to be visited may weigh, and what those of a tile that are not forced probably do. Runs in
// kWarps warps.
template <class Config>
CUTLASS_DEVICE void estimate(KernelParams const& params, EstimateStorage<Config>& shared, int first, int end) {
    using Storage = EstimateStorage<Config>;
    DecodeParams const& call = params.call;
    Workspace const& workspace = params.workspace;
    int const heads = workspace.heads;
    int const warp = threadIdx.x / kWarp;
    int const lane = threadIdx.x % kWarp;
    int const tile = warp % Storage::kTiles;
    int const unit_blocks = Storage::kTiles / params.heads_together * kTileBlocks;
    int const of_row = row_bytes(params.heads_together * summary_bytes(call.head_dim));
    int const block_of_unit = tile / params.heads_together * kTileBlocks;  // the tile's first
    int const at = block_of_unit * of_row + tile % params.heads_together * summary_bytes(call.head_dim);
    ScoringQuery<Config> kept[Config::kHeadTiles];
    auto const query = [&](int i) -> ScoringQuery<Config>& {
        if constexpr (Storage::kKept) {
            return kept[i];
        } else {
            return shared.query[warp][i][lane];
        }
    };

    // The next kernel begins when multiprocessors become free, and relies on the one before this: that has ended by half time.
    bool next_may_begin = false;
    auto const let_next_begin = [&] {
        cudaGridDependencySynchronize();
        cudaTriggerProgrammaticLaunchCompletion();
        next_may_begin = true;
    };
    SummaryUnit unit;
    int64_t pair = -1;  // whose query that is, and what follows
    int32_t const* mask = nullptr;
    // This thread's places: of a row's first block that it has, and of its first tile; of the first of its two heads.
    int const head_of_lane = lane % 4 * 2;
    float* masses = nullptr;
    float* expected = nullptr;
    for (int index = first + warp / Storage::kTiles; index < end; index += Storage::kTeams) {
        if (!next_may_begin && index - first >= end - index) { let_next_begin(); }
        unit.go_to(params, shared.rows, index, unit_blocks);
        int const kv_head = unit.first_head + tile % params.heads_together;
        int64_t const pair_now = static_cast<int64_t>(unit.row) * call.kv_heads + kv_head;
        if (pair_now != pair) {
            pair = pair_now;
            QueryView<typename Config::Element> const view(params, unit.row, kv_head);
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < Config::kHeadTiles; ++i) { query(i).fill(view, i * kHeadTile); }
            mask = words_of_mask(call, unit.row, kv_head);
            masses = workspace.masses + (pair * workspace.words * kWordBlocks + lane / 4) * heads + head_of_lane;
            expected = workspace.expected + pair * workspace.tiles * heads + head_of_lane;
        }
        int const first_block = unit.first_block + block_of_unit;
        // Of the tile's blocks those that mattered before; asked for before it is waited for summaries.
        uint32_t mattered = 0;
        if (first_block < unit.blocks) { mattered = load_kept(mask + first_block / kWordBlocks) >> first_block % kWordBlocks; }
        uint32_t const n = index - first;
        int const stage = shared.stages.place(n);
        shared.stages.wait_full(n);
        SummaryTile<Config> const summaries{shared.summaries[stage] + at, of_row};
        Moments moments[Config::kHeadTiles];
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < Config::kHeadTiles; ++i) {
            moments[i] = summaries.moments(query(i), params.scale_log2, call.head_dim);
        }
        __syncwarp();
        if (lane == 0) { Barrier::arrive(&shared.stages.empty[stage]); }

        if (first_block >= unit.blocks) { continue; }
        uint32_t const forced = forced_bits(first_block, unit.blocks) >> lane / 4;
        uint32_t const known = forced | mattered >> lane / 4;
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < Config::kHeadTiles; ++i) {
            bool const exists = i * kHeadTile + head_of_lane < heads;
            // Log2 of the masses of the outliers, and of what the others probably weigh.
            float parts[2][4];
            CUTLASS_PRAGMA_UNROLL
            for (int b = 0; b < 2; ++b) {
                float may_be[2];
                CUTLASS_PRAGMA_UNROLL
                for (int h = 0; h < 2; ++h) {
                    int const k = 2 * b + h;
                    float const outlier = moments[i].outlier[k];
                    auto others = [&](float bend) { return moments[i].mean[k] + spread(moments[i].variance[k], bend); };
                    may_be[h] = log2_of_sum(outlier, others(kGenerousBend));
                    parts[h][2 * b] = forced >> 8 * b & 1 ? -INFINITY : outlier;
                    parts[h][2 * b + 1] = forced >> 8 * b & 1 ? -INFINITY : others(kExpectedBend);
                }
                // Those that are known may be attended to by now, and what they weigh noted.
                if (exists && !(known >> 8 * b & 1)) {
                    store_kept(masses + (first_block + 8 * b) * heads + i * kHeadTile, float2{may_be[0], may_be[1]});
                }
            }
            float of_tile[2];
            CUTLASS_PRAGMA_UNROLL
            for (int h = 0; h < 2; ++h) {
                float const (&of_head)[4] = parts[h];
                float const of_lane = fmaxf(fmaxf(of_head[0], of_head[1]), fmaxf(of_head[2], of_head[3]));
                float const largest = fmaxf(-1e30f, join_rows(of_lane, fmaxf));
                float sum = 0.0f;
                CUTLASS_PRAGMA_UNROLL
                for (int k = 0; k < 4; ++k) { sum += exp2f(of_head[k] - largest); }
                of_tile[h] = largest + log2f(join_rows(sum, add));
            }
            if (exists && lane < 4) {
                store_kept(
                    expected + first_block / kTileBlocks * heads + i * kHeadTile, float2{of_tile[0], of_tile[1]});
            }
        }
    }
    if (!next_may_begin) { let_next_begin(); }
    count_done(&workspace.counters->estimated, 1u);
}

template <class Config>
__global__ void __launch_bounds__(EstimateStorage<Config>::kThreads, 1)
    estimate_kernel(__grid_constant__ KernelParams const params) {
    using Storage = EstimateStorage<Config>;
    extern __shared__ __align__(1024) uint8_t memory[];
    auto& shared = *reinterpret_cast<Storage*>(memory);
    if (threadIdx.x == blockDim.x - 1) {  // first threads look at the first rows meanwhile
        shared.stages.init(Storage::kFetchers, Storage::kTiles);
        cutlass::arch::fence_barrier_init();
    }
    int const unit_blocks = Storage::kTiles / params.heads_together * kTileBlocks;
    for (int row = threadIdx.x; row < params.call.rows; row += blockDim.x) {
        RowOptions const options(params.call, row);
        int const units = ceil_div(options.blocks(), unit_blocks) * (params.call.kv_heads / params.heads_together);
        shared.rows.note(params.call.rows, row, options);
        shared.rows.first_unit()[row] = options.everything ? 0 : units;
    }
    number_units(shared.rows.first_unit(), params.call.rows);
    // Thread blocks have equally many but for one.
    int64_t const units = shared.rows.first_unit()[params.call.rows];
    int const first = static_cast<int>(blockIdx.x * units / gridDim.x);
    int const end = static_cast<int>((blockIdx.x + 1) * units / gridDim.x);
    int const warp = threadIdx.x / kWarp;
    if (warp < Storage::kWarps) {
        estimate(params, shared, first, end);
    } else {
        fetch_summaries(params, shared, first, end, warp - Storage::kWarps);
    }
}

}  // namespace lite_attention::sm90
