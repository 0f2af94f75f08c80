// SPDX-License-Identifier: MIT
// The forward kernel: one producer warp gathers the key blocks that a row of the mask visits into product tiles, two
// consumer warpgroups take turns at the tensor cores and overlap each other's softmax, as the FlashAttention-3 paper
// (Shah et al. 2024, section 3) describes for dense attention.
#pragma once

#include <cute/tensor.hpp>
#include <cutlass/arch/reg_reconfig.h>

#include "config.h"
#include "params.h"
#include "schedule.h"
#include "softmax.h"

namespace lite_attention::sm90 {

struct KernelParams {
    // (channels, tokens, heads, batch)
    CUtensorMap query;
    CUtensorMap key;
    CUtensorMap value;
    RowParams rows;
    TensorView out;
    float* lse;
    float* lse_state;
    int64_t lse_state_batch_stride;
    int64_t lse_state_head_stride;
    int kv_group;  // query heads of a key head
    int head_dim;
    float scale_log2;
};

using Barrier = cutlass::arch::ClusterBarrier;
using CopyBarrier = cutlass::arch::ClusterTransactionBarrier;

// Copies a box of tokens, from `token` on, to row `row` of a tile of kTileRows, plane by plane; past the end come zeros.
template <class Config, int kTileRows>
CUTLASS_DEVICE void copy_rows(
    CUtensorMap const& map, uint64_t* barrier, cute::TMA::CacheHintSm90 hint, typename Config::Element* tile, int row,
    int token, int head, int batch) {
    CUTLASS_PRAGMA_UNROLL
    for (int plane = 0; plane < Config::kPlanes; ++plane) {
        cute::SM90_TMA_LOAD_4D::copy(
            &map, barrier, static_cast<uint64_t>(hint), tile + (plane * kTileRows + row) * Config::kPlane,
            plane * Config::kPlane, token, head, batch);
    }
}

template <class Config, Tracking kTracking>
CUTLASS_DEVICE void produce(KernelParams const& params, SharedStorage<Config>& shared) {
    using Walk = cute::conditional_t<kTracking == Tracking::kNone, DenseWalk, MaskWalk>;
    using Element = typename Config::Element;
    constexpr uint32_t kQueryBytes = kTileQ * Config::kHeadDim * sizeof(Element);
    constexpr uint32_t kTileBytes = Config::kTileK * Config::kHeadDim * sizeof(Element);
    RowParams const& rows = params.rows;
    bool const leader = threadIdx.x % 32 == 0;
    int const total = rows.tiles * rows.heads * rows.batch;

    RingPosition<Config::kQueryStages> query;
    RingPosition<Config::kStages> ring;
    Ledger<kTracking, Config::kBlocks> ledger;
    // The tile that had this stage a round ago.
    auto settle = [&] {
        if constexpr (kTracking != Tracking::kNone) {
            if (leader) { ledger.settle(shared.ledger[ring.index], shared.keep[ring.previous_slot()]); }
        }
    };
    int row = blockIdx.x;
    Ahead ahead;
    int taken = leader ? atomicAdd(rows.counter, 1) : 0;
    auto look_ahead = [&] {
        row = __shfl_sync(~0u, taken, 0) + gridDim.x;
        taken = leader ? atomicAdd(rows.counter, 1) : 0;
        if (row < total) { Walk::fetch(rows, row, ahead); }
    };
    if (row < total) { Walk::fetch(rows, row, ahead); }
    while (row < total) {
        Work work = ahead.work;
        Walk walk(rows, ahead);
        work.steps = (walk.visits() + Config::kBlocks - 1) / Config::kBlocks;
        work.threshold = walk.threshold();

        Barrier::wait(&shared.query_empty[query.index], query.phase ^ 1);
        if (leader) {
            shared.work[query.index] = work;
            CopyBarrier::arrive_and_expect_tx(&shared.query_full[query.index], kQueryBytes);
            copy_rows<Config, kTileQ>(
                params.query, &shared.query_full[query.index], cute::TMA::CacheHintSm90::EVICT_FIRST,
                shared.query + query.index * kTileQ * Config::kHeadDim, 0, work.tile * kTileQ, work.head, work.batch);
        }
        query.advance();

        int const kv_head = work.head / params.kv_group;
        // The first tile holds what is over, so that only there something is hidden (but for causal rows).
        int blocks = walk.visits() - (work.steps - 1) * Config::kBlocks;
        for (int step = 0; step < work.steps; ++step) {
            Visit<Config::kBlocks> visit;
            int token[Config::kBlocks];
            CUTLASS_PRAGMA_UNROLL
            for (int b = 0; b < Config::kBlocks; ++b) {
                visit.block[b] = b < blocks ? walk.next() : -1;
                // A missing block is read past the end: zeros, without traffic.
                token[b] = (visit.block[b] >= 0 ? visit.block[b] : ceil_div(rows.tokens_k, kBlockK)) * kBlockK;
            }
            auto copy_tile = [&](CUtensorMap const& map, uint64_t* full, Element* tiles) {
                CopyBarrier::arrive_and_expect_tx(&full[ring.index], kTileBytes);
                CUTLASS_PRAGMA_UNROLL
                for (int b = 0; b < Config::kBlocks; ++b) {
                    copy_rows<Config, Config::kTileK>(
                        map, &full[ring.index], cute::TMA::CacheHintSm90::EVICT_LAST,
                        tiles + ring.index * Config::kTileK * Config::kHeadDim, b * kBlockK, token[b], kv_head, work.batch);
                }
            };
            Barrier::wait(&shared.key_empty[ring.index], ring.phase ^ 1);
            if (leader) {
                shared.visit[ring.index] = visit;
                copy_tile(params.key, shared.key_full, shared.key);
            }
            blocks = Config::kBlocks;
            Barrier::wait(&shared.value_empty[ring.index], ring.phase ^ 1);
            settle();
            if (leader) {
                if constexpr (kTracking != Tracking::kNone) {
                    LedgerEntry<Config::kBlocks>& entry = shared.ledger[ring.index];
                    entry.words = walk.words();
                    entry.visit = visit;
                    entry.first = step == 0;
                    entry.last = step == work.steps - 1;
                    entry.forced = walk.forced();
                }
                copy_tile(params.value, shared.value_full, shared.value);
            }
            ring.advance();
            if (step == 0) { look_ahead(); }
        }
        if (work.steps == 0) { look_ahead(); }
        walk.finish();
    }
    for (int i = 0; i < Config::kStages; ++i) {
        Barrier::wait(&shared.value_empty[ring.index], ring.phase ^ 1);
        settle();
        ring.advance();
    }
    Barrier::wait(&shared.query_empty[query.index], query.phase ^ 1);
    if (leader) {
        shared.work[query.index].tile = -1;
        Barrier::arrive(&shared.query_full[query.index]);
    }
}

// Hides the keys that a query does not attend: past the end, past its place in a causal row, or of no block at all.
template <int kBlocks, class Scores>
CUTLASS_DEVICE void hide(RowParams const& rows, Visit<kBlocks> const& visit, int first_row, int query, Scores& scores) {
    int const ahead = rows.tokens_k - rows.tokens_q;
    int const column = threadIdx.x % 4 * 2;
    CUTLASS_PRAGMA_UNROLL
    for (int b = 0; b < kBlocks; ++b) {
        int const attended = rows.causal ? min(rows.tokens_k, first_row + ahead + 1) : rows.tokens_k;
        if (visit.block[b] >= 0 && (visit.block[b] + 1) * kBlockK <= attended) { continue; }
        CUTLASS_PRAGMA_UNROLL
        for (int r = 0; r < 2; ++r) {
            int const last = rows.causal ? min(rows.tokens_k, query + 8 * r + ahead + 1) : rows.tokens_k;
            int const limit = visit.block[b] >= 0 ? last - visit.block[b] * kBlockK - column : 0;
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < 16; ++i) {
                if (i / 2 * 8 + i % 2 >= limit) { scores(i % 2 + 2 * r + 4 * (8 * b + i / 2)) = -INFINITY; }
            }
        }
    }
}

template <class Config, Tracking kTracking>
CUTLASS_DEVICE void consume(KernelParams const& params, SharedStorage<Config>& shared) {
    using namespace cute;
    using Element = typename Config::Element;
    constexpr int kBlocks = Config::kBlocks;
    RowParams const& rows = params.rows;
    int const warpgroup = cutlass::canonical_warp_group_idx() - 1;
    int const lane = threadIdx.x % 32;
    // Place in the tile of the first of this thread's two queries.
    int const row_in_tile = (threadIdx.x / 32 - kWarpgroup / 32) * 16 + lane / 4;

    Tensor query = make_tensor(make_smem_ptr(shared.query), typename Config::LayoutQ{});
    Tensor key = make_tensor(make_smem_ptr(shared.key), typename Config::LayoutK{});
    Tensor value = make_tensor(make_smem_ptr(shared.value), typename Config::LayoutVt{});
    typename Config::MmaQK mma_qk;
    typename Config::MmaPV mma_pv;
    // Descriptors depend on the warpgroup alone.
    auto const slice_qk = mma_qk.get_slice(warpgroup * kWarpgroup);
    auto const slice_pv = mma_pv.get_slice(warpgroup * kWarpgroup);
    Tensor q = slice_qk.partition_fragment_A(query);
    Tensor k = slice_qk.partition_fragment_B(key);
    Tensor v = slice_pv.partition_fragment_B(value);
    Tensor scores = partition_fragment_C(mma_qk, Shape<Int<kTileQ>, Int<Config::kTileK>>{});
    Tensor out = partition_fragment_C(mma_pv, Shape<Int<kTileQ>, Int<Config::kHeadDim>>{});
    // Weights as the first operand of the second product: the order of the scores, 16 keys at a time.
    Tensor weights = make_tensor<Element>(Layout<Shape<Shape<_2, _2, _2>, _1, Int<Config::kTileK / 16>>>{});
    static_assert(decltype(size(scores))::value == kBlocks * 32 && decltype(size(weights))::value == kBlocks * 32);

    auto& words = *reinterpret_cast<uint32_t(*)[kBlocks * 16]>(raw_pointer_cast(weights.data()));

    Softmax<kTracking, kBlocks, Element> softmax(params.scale_log2);
    RingPosition<Config::kQueryStages> query_ring;
    RingPosition<Config::kStages> key_ring;
    RingPosition<Config::kStages> value_ring;

    auto arrive = [&](uint64_t& barrier) {
        __syncwarp();
        if (lane == 0) { Barrier::arrive(&barrier); }
    };
    auto take_turn = [&] {
        cutlass::arch::NamedBarrier::sync(kConsumers * kWarpgroup, kTurnBarrier + warpgroup);
    };
    auto pass_turn = [&] {
        cutlass::arch::NamedBarrier::arrive(kConsumers * kWarpgroup, kTurnBarrier + (warpgroup ^ 1));
    };
    auto issue_qk = [&] {
        warpgroup_fence_operand(scores);
        warpgroup_arrive();
        mma_qk.accumulate_ = GMMA::ScaleOut::Zero;
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < size<2>(q); ++i) {
            cute::gemm(mma_qk, q(_, _, i, query_ring.index), k(_, _, i, key_ring.index), scores);
            mma_qk.accumulate_ = GMMA::ScaleOut::One;
        }
        warpgroup_commit_batch();
    };
    auto issue_pv = [&] {
        warpgroup_fence_operand(out);
        warpgroup_arrive();
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < size<2>(weights); ++i) {
            cute::gemm(mma_pv, weights(_, _, i), v(_, _, i, value_ring.index), out);
            mma_pv.accumulate_ = GMMA::ScaleOut::One;
        }
        warpgroup_commit_batch();
    };
    auto say = [&](int slot, uint32_t keep) {
        if (kTracking != Tracking::kNone && lane == 0) {
            shared.keep[slot][threadIdx.x / 32 - kWarpgroup / 32] = keep;
        }
    };

    if (warpgroup == 1) { pass_turn(); }

    while (true) {
        Barrier::wait(&shared.query_full[query_ring.index], query_ring.phase);
        Work const work = shared.work[query_ring.index];
        if (work.tile < 0) { break; }
        int const first_row = work.tile * kTileQ + warpgroup * 64;
        int const row = work.tile * kTileQ + row_in_tile;
        bool const valid[2] = {row < rows.tokens_q, row + 8 < rows.tokens_q};
        float* lse_state = nullptr;
        float lse_before[2] = {INFINITY, INFINITY};
        if constexpr (kTracking == Tracking::kMass) {
            if (work.threshold > -INFINITY) {
                lse_state = params.lse_state + work.batch * params.lse_state_batch_stride +
                            work.head * params.lse_state_head_stride + row;
                CUTLASS_PRAGMA_UNROLL
                for (int r = 0; r < 2; ++r) {
                    if (valid[r]) { lse_before[r] = lse_state[8 * r]; }
                }
            }
        }
        softmax.begin(work.threshold, valid, lse_before);

        mma_pv.accumulate_ = GMMA::ScaleOut::Zero;
        if (work.steps > 0) {
            Barrier::wait(&shared.key_full[key_ring.index], key_ring.phase);
            Visit<kBlocks> visit = shared.visit[key_ring.index];
            int slot = key_ring.slot();
            issue_qk();
            warpgroup_wait<0>();
            warpgroup_fence_operand(scores);
            arrive(shared.key_empty[key_ring.index]);
            key_ring.advance();
            if (work.steps == 1) { arrive(shared.query_empty[query_ring.index]); }
            hide(rows, visit, first_row, row, scores);
            softmax.first(scores, words);

            for (int step = 1; step < work.steps; ++step) {
                Barrier::wait(&shared.key_full[key_ring.index], key_ring.phase);
                if (rows.causal) { visit = shared.visit[key_ring.index]; }
                take_turn();
                warpgroup_fence_operand(weights);
                issue_qk();
                Barrier::wait(&shared.value_full[value_ring.index], value_ring.phase);
                issue_pv();
                pass_turn();
                // Judging the tile before takes no time of its own while the products are under way.
                say(slot, softmax.judge(*static_cast<uint32_t const volatile*>(&shared.zero)));
                warpgroup_wait<0>();
                warpgroup_fence_operand(scores);
                warpgroup_fence_operand(out);
                arrive(shared.key_empty[key_ring.index]);
                arrive(shared.value_empty[value_ring.index]);
                slot = key_ring.slot();
                key_ring.advance();
                value_ring.advance();
                if (step == work.steps - 1) { arrive(shared.query_empty[query_ring.index]); }
                if (rows.causal) { hide(rows, visit, first_row, row, scores); }
                float rescale[2];
                bool const raised = softmax.step(scores, words, rescale);
                if (raised) {
                    CUTLASS_PRAGMA_UNROLL
                    for (int i = 0; i < size(out); ++i) { out(i) *= rescale[i / 2 % 2]; }
                }
            }
            Barrier::wait(&shared.value_full[value_ring.index], value_ring.phase);
            issue_pv();
            say(slot, softmax.judge(0));
            warpgroup_wait<0>();
            warpgroup_fence_operand(out);
            arrive(shared.value_empty[value_ring.index]);
            value_ring.advance();
        } else {
            arrive(shared.query_empty[query_ring.index]);
            clear(out);
        }
        query_ring.advance();

        float factor[2];
        float lse[2];
        softmax.end(factor, lse);
        Element* const out_row = static_cast<Element*>(params.out.data) + work.batch * params.out.batch_stride +
                                 work.head * params.out.head_stride + row * params.out.token_stride;
        CUTLASS_PRAGMA_UNROLL
        for (int r = 0; r < 2; ++r) {
            if (!valid[r]) { continue; }
            if (lane % 4 == 0) {
                params.lse[(static_cast<int64_t>(work.batch) * rows.heads + work.head) * rows.tokens_q + row + 8 * r] =
                    lse[r];
                if (lse_state != nullptr) { lse_state[8 * r] = lse[r]; }
            }
            CUTLASS_PRAGMA_UNROLL
            for (int j = 0; j < Config::kHeadDim / 8; ++j) {
                int const channel = 8 * j + lane % 4 * 2;
                if (channel < params.head_dim) {
                    int const i = 2 * r + 4 * j;
                    *reinterpret_cast<uint32_t*>(out_row + 8 * r * params.out.token_stride + channel) =
                        pack(out(i) * factor[r], out(i + 1) * factor[r], Element{});
                }
            }
        }
    }
}

template <class Config, Tracking kTracking>
__global__ void __launch_bounds__(kThreads, 1) forward_kernel(__grid_constant__ KernelParams const params) {
    // Swizzled tiles repeat every 1024 bytes; dynamic shared memory starts at such an address.
    extern __shared__ __align__(1024) char raw[];
    auto& shared = *reinterpret_cast<SharedStorage<Config>*>(raw);
    if (threadIdx.x == 0) {
        cute::prefetch_tma_descriptor(&params.query);
        cute::prefetch_tma_descriptor(&params.key);
        cute::prefetch_tma_descriptor(&params.value);
        for (int i = 0; i < Config::kQueryStages; ++i) {
            Barrier::init(&shared.query_full[i], 1);
            Barrier::init(&shared.query_empty[i], kConsumerWarps);
        }
        for (int i = 0; i < Config::kStages; ++i) {
            Barrier::init(&shared.key_full[i], 1);
            Barrier::init(&shared.key_empty[i], kConsumerWarps);
            Barrier::init(&shared.value_full[i], 1);
            Barrier::init(&shared.value_empty[i], kConsumerWarps);
        }
        shared.zero = 0;
        for (int i = 0; i < Config::kStages; ++i) { shared.ledger[i].words = nullptr; }
        cutlass::arch::fence_barrier_init();
    }
    __syncthreads();
    if (cutlass::canonical_warp_group_idx() == 0) {
        cutlass::arch::warpgroup_reg_dealloc<kProducerRegisters>();
        if (cutlass::canonical_warp_idx_sync() == 0) { produce<Config, kTracking>(params, shared); }
    } else {
        cutlass::arch::warpgroup_reg_alloc<kConsumerRegisters>();
        consume<Config, kTracking>(params, shared);
    }
}

}  // namespace lite_attention::sm90
