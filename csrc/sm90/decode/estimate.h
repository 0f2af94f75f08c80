// SPDX-License-Identifier: MIT
// The first kernel of a decode step: what the blocks of sequences that skip weigh, by their summaries, and what all of them have
// together, in parts. Each warp takes a part at a time, while what the next one needs comes. The second kernel compares the two.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "score.h"

namespace lite_attention::sm90 {

// Of `spread`; see lite_attention/reference.py.
constexpr float kExpectedBend = 4.0f;
constexpr float kGenerousBend = 8.0f;
static_assert(kWordBlocks == kWarp && kExactParts == 2);

template <class Config>
struct EstimateStorage {
    struct OfWarp {
        Summaries<Config> half[2];  // rows of the first 16 lanes' and of the others: of the part at hand, then of the next
        ScoringQuery<Config> query[Config::kHeadTiles];
        uint64_t arrived[2];  // barriers of `half`
    };
    // As many warps as shared memory has room for.
    static constexpr int kWarps = std::min<int>(16, (kSharedBytes - (kMaxRows + 4) * sizeof(int)) / sizeof(OfWarp));
    OfWarp of_warp[kWarps];
    int first_unit[1];  // of each row, and the number of units at the end: rows + 1 of them
};

// A part of what a sequence's key head has, and what a lane has fetched of it: the summary of a block, or a key. The first two
// parts are the blocks that are visited in any case, which are weighed exactly, 16 keys each: the first and the newest, and the
// one before it. A word's blocks but for them are each of the others.
template <class Config>
struct Part {
    Place place;
    int block;
    bool exists;
    int bytes;  // the same in all lanes
    uint8_t const* data;
    typename ScoringQuery<Config>::Raw query[Config::kHeadTiles];

    // Asks for what must be read to know it.
    CUTLASS_DEVICE Part(KernelParams const& params, int const* first_unit, int index) : place(params.call, first_unit, index) {
        DecodeParams const& call = params.call;
        int const lane = threadIdx.x % kWarp;
        int const row = lane % kDecodeBlock;
        if (exact()) {
            int const forced = lane < kDecodeBlock ? 0 : 1;
            block = place.number == 0 ? forced * (place.blocks - 1) : place.blocks - 2;
            bool const another = place.number == 0 ? forced < place.blocks : forced == 0 && block > 0;
            exists = another && block * kDecodeBlock + row < place.length;
            bytes = 2 * call.head_dim;
        } else {
            block = (place.number - kExactParts) * kWordBlocks + lane;
            exists = block < place.blocks && !place.forced(block);
            bytes = 3 * call.head_dim + 16;
        }
        int const blocks_of_page = call.page_size / kDecodeBlock;
        int const page = exists ? call.block_table[place.row * call.block_table_stride + block / blocks_of_page] : 0;
        int const within = block % blocks_of_page;
        data = exact() ? static_cast<uint8_t const*>(call.key.data) +
                             2 * (page * call.key.page_stride + (within * kDecodeBlock + row) * call.key.token_stride +
                                  place.kv_head * call.key.head_stride)
                       : call.summaries.data + page * call.summaries.page_stride +
                             place.kv_head * call.summaries.head_stride + within * call.summaries.block_stride;
        CUTLASS_PRAGMA_UNROLL
        for (int tile = 0; tile < Config::kHeadTiles; ++tile) { query[tile].load(heads(params), tile * kHeadTile); }
    }

    CUTLASS_DEVICE bool exact() const { return place.number < kExactParts; }
    CUTLASS_DEVICE QueryView<typename Config::Element> heads(KernelParams const& params) const {
        return {params, place.row, place.kv_head};
    }
};

// Has a half of a part fetched. All lanes must have left what was at its place.
template <class Config>
CUTLASS_DEVICE void fetch_half(
    typename EstimateStorage<Config>::OfWarp& shared, Part<Config> const& part, int half) {
    int const lane = threadIdx.x % kWarp;
    bool const fetches = part.exists && lane / kDecodeBlock == half;
    int const rows = __popc(__ballot_sync(~0u, fetches));
    if (lane == 0) { CopyBarrier::arrive_and_expect_tx(&shared.arrived[half], rows * part.bytes); }
    __syncwarp();
    if (fetches) {
        cute::SM90_BULK_COPY_G2S::copy(
            part.data, &shared.arrived[half], shared.half[half].row[lane % kDecodeBlock], part.bytes);
    }
}

// Weighs a half of a part once it is there: adds what it probably has to this thread's sums, and notes what its blocks may have.
template <class Config>
CUTLASS_DEVICE void weigh_half(
    KernelParams const& params, typename EstimateStorage<Config>::OfWarp const& shared, Part<Config> const& part, int half,
    LogSum (&sum)[Config::kHeadTiles][2]) {
    Workspace const& workspace = params.workspace;
    Summaries<Config> const& rows = shared.half[half];
    int const lane = threadIdx.x % kWarp;
    uint32_t const existing = __ballot_sync(~0u, part.exists) >> half * kDecodeBlock & 0xffff;
    if (existing == 0) { return; }
    if (part.exact()) {
        CUTLASS_PRAGMA_UNROLL
        for (int tile = 0; tile < Config::kHeadTiles; ++tile) {
            float2 const mass =
                exact_mass<Config>(rows, __popc(existing), part.heads(params), tile * kHeadTile, params.scale_log2);
            sum[tile][0].add(lane < 4 ? mass.x : -INFINITY);
            sum[tile][1].add(lane < 4 ? mass.y : -INFINITY);
        }
        return;
    }
    int const first_block = (part.place.number - kExactParts) * kWordBlocks + half * kDecodeBlock;
    float* const masses =
        workspace.masses + (part.place.pair * workspace.words * kWordBlocks + first_block) * workspace.heads;
    CUTLASS_PRAGMA_UNROLL
    for (int tile = 0; tile < Config::kHeadTiles; ++tile) {
        int const head = tile * kHeadTile + lane % 4 * 2;  // this thread's: this one and the next
        Moments const moments = rows.moments(shared.query[tile], params.scale_log2, params.call.head_dim);
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 2; ++i) {
            int const row = lane / 4 + i * 8;  // this thread's blocks
            bool const exists = existing >> row & 1;
            float2 may_be;
            CUTLASS_PRAGMA_UNROLL
            for (int j = 0; j < 2; ++j) {
                int const k = 2 * i + j;
                auto mass = [&](float bend) {
                    return log2_of_sum(moments.outlier[k], moments.mean[k] + spread(moments.variance[k], bend));
                };
                sum[tile][j].add(exists ? mass(kExpectedBend) : -INFINITY);
                (j == 0 ? may_be.x : may_be.y) = mass(kGenerousBend);
            }
            if (exists && head < workspace.heads) {
                *reinterpret_cast<float2*>(masses + row * workspace.heads + head) = may_be;
            }
        }
    }
}

// Weighs this warp's parts, from `index` up to `end`, each kWarps further.
template <class Config>
CUTLASS_DEVICE void weigh_parts(
    KernelParams const& params, EstimateStorage<Config>& storage, int index, int end) {
    constexpr int kWarps = EstimateStorage<Config>::kWarps;
    Workspace const& workspace = params.workspace;
    auto& shared = storage.of_warp[threadIdx.x / kWarp];
    int const lane = threadIdx.x % kWarp;
    if (lane == 0) {
        CopyBarrier::init(&shared.arrived[0], 1);
        CopyBarrier::init(&shared.arrived[1], 1);
        cutlass::arch::fence_barrier_init();
    }
    __syncwarp();
    if (index >= end) { return; }
    Part<Config> part(params, storage.first_unit, index);
    fetch_half(shared, part, 0);
    fetch_half(shared, part, 1);
#pragma unroll 1
    for (int phase = 0;; phase ^= 1) {
        CUTLASS_PRAGMA_UNROLL
        for (int tile = 0; tile < Config::kHeadTiles; ++tile) { shared.query[tile].fill(part.query[tile]); }
        __syncwarp();
        index += kWarps;
        Part<Config> const next(params, storage.first_unit, min(index, end - 1));
        LogSum sum[Config::kHeadTiles][2];
#pragma unroll 1
        for (int half = 0; half < 2; ++half) {
            CopyBarrier::wait(&shared.arrived[half], phase);
            weigh_half(params, shared, part, half, sum);
            __syncwarp();
            if (index < end) { fetch_half(shared, next, half); }
        }
        CUTLASS_PRAGMA_UNROLL
        for (int tile = 0; tile < Config::kHeadTiles; ++tile) {
            sum[tile][0].join_lanes(4, kWarp);
            sum[tile][1].join_lanes(4, kWarp);
            int const head = tile * kHeadTile + lane * 2;
            if (lane < 4 && head < workspace.heads) {
                float* const expected = workspace.expected_of(part.place.pair) + part.place.number * workspace.heads + head;
                *reinterpret_cast<float2*>(expected) = {sum[tile][0].log2(), sum[tile][1].log2()};
            }
        }
        if (index >= end) { break; }
        part = next;
    }
}

template <class Config>
__global__ void __launch_bounds__(EstimateStorage<Config>::kWarps * kWarp, 1)
    estimate_kernel(__grid_constant__ KernelParams const params) {
    extern __shared__ __align__(1024) uint8_t memory[];
    auto& shared = *reinterpret_cast<EstimateStorage<Config>*>(memory);
    // The second kernel waits where it needs what this one writes.
    cudaTriggerProgrammaticLaunchCompletion();
    DecodeParams const& call = params.call;
    int const first = blockIdx.x * blockDim.x + threadIdx.x;
    for (int i = first; i < call.rows * call.kv_heads; i += gridDim.x * blockDim.x) { params.workspace.ended[i] = 0; }
    if (first == 0) { *params.workspace.drawn = 0; }

    number_units(call, shared.first_unit, [&](int row) {
        return visits_everything(call, row) ? 0 : parts_of(call.seq_lens[row]);
    });
    // Thread blocks have equally many but for one, and neighbouring warps neighbouring key heads, whose summaries lie side by side.
    int64_t const units = shared.first_unit[call.rows];
    auto first_of = [&](int64_t thread_block) { return static_cast<int>(thread_block * units / gridDim.x); };
    weigh_parts(params, shared, first_of(blockIdx.x) + static_cast<int>(threadIdx.x / kWarp), first_of(blockIdx.x + 1));
}

}  // namespace lite_attention::sm90
