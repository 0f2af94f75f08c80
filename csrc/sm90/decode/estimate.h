// SPDX-License-Identifier: MIT
// The first kernel of a decode step: what the blocks of sequences that skip weigh, by their summaries. Each warp takes a segment at
// a time.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "score.h"

namespace lite_attention::sm90 {

// Of `spread`; see lite_attention/reference.py.
constexpr float kExpectedBend = 4.0f;
constexpr float kGenerousBend = 8.0f;
static_assert(kSegmentBlocks % kWarp == 0);

template <class Config>
struct EstimateStorage {
    struct OfWarp {
        Summaries<Config> summaries[2];  // of the blocks at hand, and of the next ones while they come
        ScoringQuery<Config> query[Config::kHeadTiles];
        uint8_t const* address[kSegmentBlocks];  // of each block's summary
        float exact[3][Config::kHeads];  // log2 of the mass of the first block, the newest, and the one before it
        uint64_t arrived[2];  // barriers of `summaries`
    };
    // As many warps as shared memory has room for.
    static constexpr int kWarps = std::min<int>(16, (kSharedBytes - (kMaxRows + 4) * sizeof(int)) / sizeof(OfWarp));
    OfWarp of_warp[kWarps];
    int first_unit[1];  // of each row, and the number of units at the end: rows + 1 of them
};

// Brings summaries, kBlocks at a time, into the two places by turns. Runs in a warp.
template <class Config>
struct SummaryFetcher {
    typename EstimateStorage<Config>::OfWarp& shared;
    int summary_bytes;
    uint32_t fetched = 0;
    uint32_t taken = 0;

    CUTLASS_DEVICE void init() {
        if (threadIdx.x % kWarp == 0) {
            CopyBarrier::init(&shared.arrived[0], 1);
            CopyBarrier::init(&shared.arrived[1], 1);
            cutlass::arch::fence_barrier_init();
        }
        __syncwarp();
    }

    // Asks for the summaries at `address`. All lanes must have left the ones that were at their place.
    CUTLASS_DEVICE void fetch(uint8_t const* const* address) {
        constexpr int kBlocks = Summaries<Config>::kBlocks;
        int const lane = threadIdx.x % kWarp;
        int const place = fetched++ % 2;
        if (lane == 0) { CopyBarrier::arrive_and_expect_tx(&shared.arrived[place], kBlocks * summary_bytes); }
        __syncwarp();
        if (lane < kBlocks) {
            cute::SM90_BULK_COPY_G2S::copy(
                address[lane], &shared.arrived[place], shared.summaries[place].row[lane], summary_bytes);
        }
    }

    // The ones that were asked for first, once they are there.
    CUTLASS_DEVICE Summaries<Config> const& take() {
        int const place = taken % 2;
        CopyBarrier::wait(&shared.arrived[place], taken / 2 & 1);
        ++taken;
        return shared.summaries[place];
    }
};

// A segment of a row that skips, for one key head.
struct Segment : RowOptions {
    int row;
    int kv_head;
    int number;    // among those of the row and key head
    int64_t pair;  // number of the row and key head

    // `number`: among those of the row. Neighbours are of neighbouring key heads, whose summaries lie side by side.
    CUTLASS_DEVICE Segment(DecodeParams const& call, int row, int number)
        : RowOptions(call, row),
          row(row),
          kv_head(number % call.kv_heads),
          number(number / call.kv_heads),
          pair(static_cast<int64_t>(row) * call.kv_heads + kv_head) {}
};

// Notes what each block of a segment may weigh, and what all of them together probably do. Runs in a warp.
template <class Config>
CUTLASS_DEVICE void estimate_segment(
    KernelParams const& params, typename EstimateStorage<Config>::OfWarp& shared, SummaryFetcher<Config>& fetcher,
    Segment const& segment) {
    using Element = typename Config::Element;
    DecodeParams const& call = params.call;
    Workspace const& workspace = params.workspace;
    int const lane = threadIdx.x % kWarp;
    int const blocks_of_page = call.page_size / kDecodeBlock;
    int const first_block = segment.number * kSegmentBlocks;
    int const end = min(segment.blocks, first_block + kSegmentBlocks);
    auto page_of = [&](int block) { return call.block_table[segment.row * call.block_table_stride + block / blocks_of_page]; };

    int page[kSegmentBlocks / kWarp];
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kSegmentBlocks / kWarp; ++i) {
        page[i] = page_of(min(first_block + i * kWarp + lane, end - 1));  // what does not exist has the summary of another
    }
    __syncwarp();  // the segment before may still be read
    QueryView<Element> const query(params, segment.row, segment.kv_head);
    CUTLASS_PRAGMA_UNROLL
    for (int tile = 0; tile < Config::kHeadTiles; ++tile) { shared.query[tile].fill(query, tile * kHeadTile); }
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kSegmentBlocks / kWarp; ++i) {
        int const block = min(first_block + i * kWarp + lane, end - 1);
        shared.address[i * kWarp + lane] = call.summaries.data + page[i] * call.summaries.page_stride +
                                           segment.kv_head * call.summaries.head_stride +
                                           block % blocks_of_page * call.summaries.block_stride;
    }
    __syncwarp();
    constexpr int kAtOnce = Summaries<Config>::kBlocks;
    fetcher.fetch(shared.address);
    if (first_block + kAtOnce < end) { fetcher.fetch(shared.address + kAtOnce); }

    // What is visited in any case is weighed exactly. The summaries come meanwhile.
#pragma unroll 1
    for (int i = 0; i < 3; ++i) {
        int const block = i == 0 ? 0 : segment.blocks - i;
        if (block < first_block || block >= end) { continue; }
        auto const* const keys = static_cast<Element const*>(call.key.data) + page_of(block) * call.key.page_stride +
                                 block % blocks_of_page * kDecodeBlock * call.key.token_stride +
                                 segment.kv_head * call.key.head_stride;
        int const count = min(kDecodeBlock, segment.length - block * kDecodeBlock);
        CUTLASS_PRAGMA_UNROLL
        for (int tile = 0; tile < Config::kHeadTiles; ++tile) {
            float2 const exact =
                exact_mass<Config>(keys, call.key.token_stride, count, query, tile * kHeadTile, params.scale_log2);
            if (lane < 4) { *reinterpret_cast<float2*>(&shared.exact[i][tile * kHeadTile + lane * 2]) = exact; }
        }
    }
    __syncwarp();

    float* const masses = workspace.masses + segment.pair * workspace.words * kWordBlocks * workspace.heads;
    LogSum expected_sum[Config::kHeadTiles][2];  // of this thread's blocks
    for (int first = first_block; first < end; first += kAtOnce) {
        Summaries<Config> const& summaries = fetcher.take();
        int const low = first + lane / 4;  // this thread's blocks: this one and 8 further
        CUTLASS_PRAGMA_UNROLL
        for (int tile = 0; tile < Config::kHeadTiles; ++tile) {
            int const head = tile * kHeadTile + lane % 4 * 2;  // this thread's: this one and the next
            Moments const moments = summaries.moments(shared.query[tile], params.scale_log2, call.head_dim);
            float expected[4];
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < 2; ++i) {
                int const block = low + i * 8;
                bool const exists = block < end;
                float may_be[2];
                CUTLASS_PRAGMA_UNROLL
                for (int j = 0; j < 2; ++j) {
                    int const k = 2 * i + j;
                    auto mass = [&](float bend) {
                        return log2_of_sum(moments.outlier[k], moments.mean[k] + spread(moments.variance[k], bend));
                    };
                    expected[k] = exists ? mass(kExpectedBend) : -INFINITY;
                    may_be[j] = mass(kGenerousBend);
                }
                if (exists && head < workspace.heads) {
                    *reinterpret_cast<float2*>(masses + static_cast<int64_t>(block) * workspace.heads + head) = {
                        may_be[0], may_be[1]};
                }
            }
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < 2; ++i) {
                int const block = low + i * 8;
                if (block < end && segment.forced(block)) {
                    float2 const exact = *reinterpret_cast<float2 const*>(
                        &shared.exact[block == 0 ? 0 : segment.blocks - block][tile * kHeadTile + lane % 4 * 2]);
                    expected[2 * i] = exact.x;
                    expected[2 * i + 1] = exact.y;
                }
            }
            CUTLASS_PRAGMA_UNROLL
            for (int j = 0; j < 4; ++j) { expected_sum[tile][j % 2].add(expected[j]); }
        }
        __syncwarp();  // all lanes have left these summaries
        if (first + 2 * kAtOnce < end) { fetcher.fetch(shared.address + (first + 2 * kAtOnce - first_block)); }
    }
    CUTLASS_PRAGMA_UNROLL
    for (int tile = 0; tile < Config::kHeadTiles; ++tile) {
        expected_sum[tile][0].join_lanes(4, kWarp);
        expected_sum[tile][1].join_lanes(4, kWarp);
        int const head = tile * kHeadTile + lane * 2;
        if (lane < 4 && head < workspace.heads) {
            *reinterpret_cast<float2*>(
                workspace.expected + (segment.pair * workspace.segments + segment.number) * workspace.heads + head) = {
                expected_sum[tile][0].log2(), expected_sum[tile][1].log2()};
        }
    }
}

template <class Config>
__global__ void __launch_bounds__(EstimateStorage<Config>::kWarps * kWarp, 1)
    estimate_kernel(__grid_constant__ KernelParams const params) {
    extern __shared__ __align__(1024) uint8_t memory[];
    auto& shared = *reinterpret_cast<EstimateStorage<Config>*>(memory);
    // The next kernel waits where it needs what this one writes.
    cudaTriggerProgrammaticLaunchCompletion();
    DecodeParams const& call = params.call;
    number_units(call, shared.first_unit, [&](int, RowOptions const& row) {
        return row.everything ? 0 : segments_of(row.length) * call.kv_heads;
    });
    int const units = shared.first_unit[call.rows];
    constexpr int kWarps = EstimateStorage<Config>::kWarps;
    auto& of_warp = shared.of_warp[threadIdx.x / kWarp];
    SummaryFetcher<Config> fetcher{of_warp, 3 * call.head_dim + 16};
    fetcher.init();
    // Thread blocks have equally many but for one.
    auto first_of = [&](int64_t thread_block) { return static_cast<int>(thread_block * units / gridDim.x); };
    int const end = first_of(blockIdx.x + 1);
    for (int index = first_of(blockIdx.x) + threadIdx.x / kWarp; index < end; index += kWarps) {
        int const row = row_of(shared.first_unit, call.rows, index);
        estimate_segment<Config>(params, of_warp, fetcher, Segment(call, row, index - shared.first_unit[row]));
    }
}

}  // namespace lite_attention::sm90
