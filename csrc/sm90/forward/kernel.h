// SPDX-License-Identifier: MIT
// The forward kernel: one warp plans which key blocks a row of the mask visits, one thread has them gathered into product
// tiles, two to four consumer warpgroups take turns at the tensor cores and overlap each other's softmax, as the
// FlashAttention-3 paper (Shah et al. 2024, section 3) describes for dense attention.
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
    TensorView out;
    int head_dim;
    RowParams rows;
    float* lse;
    float* lse_state;
    int64_t lse_state_batch_stride;
    int64_t lse_state_head_stride;
    int kv_group;  // query heads of a key head
    float scale_log2;
};

// Where summaries stand in for blocks that are not visited.
struct SummaryKernelParams : KernelParams {
    // (channels, blocks, key heads, batch)
    CUtensorMap mean;
    CUtensorMap variance;
    CUtensorMap mean_value;
    int32_t* skipped;  // notes of the planning warps: as much as the mask, contiguous
    // Queries are multiplied by `query_scale` before they are squared, so that half floats hold the squares; what is still missing is
    // in the factor of their products with variances, see Softmax::estimate.
    float query_scale;
    float variance_scale;
};

template <class Config>
using ParamsOf = cute::conditional_t<(Config::kSummaries > 0), SummaryKernelParams, KernelParams>;

// A token that no tensor has: what is read there are zeros, without traffic.
constexpr int kPastTheEnd = 1 << 30;

// Copies a box of tokens, from `token` on, to row `row` of a tile of kTileRows, plane by plane; past the end come zeros. The
// tiles and barriers of kReceivers thread blocks of the cluster get the same.
template <class Config, int kTileRows, int kReceivers>
CUTLASS_DEVICE void copy_rows(
    CUtensorMap const& map, uint64_t* barrier, cute::TMA::CacheHintSm90 hint, typename Config::Element* tile, int row,
    int token, int head, int batch) {
    CUTLASS_PRAGMA_UNROLL
    for (int plane = 0; plane < Config::kPlanes; ++plane) {
        auto* const to = tile + (plane * kTileRows + row) * Config::kPlane;
        int const channel = plane * Config::kPlane;
        if constexpr (kReceivers == 1) {
            cute::SM90_TMA_LOAD_4D::copy(
                &map, barrier, static_cast<uint64_t>(hint), to, channel, token, head, batch);
        } else {
            cute::SM90_TMA_LOAD_MULTICAST_4D::copy(
                &map, barrier, (1 << kReceivers) - 1, static_cast<uint64_t>(hint), to, channel, token, head, batch);
        }
    }
}

// Has the copy engine gather queries, keys and values as planned. Runs in one thread.
template <class Config>
CUTLASS_DEVICE void fetch(ParamsOf<Config> const& params, SharedStorage<Config>& shared) {
    using Element = typename Config::Element;
    constexpr int kQueries = Config::kRows / Config::kConsumers;
    constexpr uint32_t kQueryBytes = kQueries * Config::kHeadDim * sizeof(Element);
    constexpr uint32_t kTileBytes = Config::kTileK * Config::kHeadDim * sizeof(Element);
    int const part = blockIdx.x % Config::kCluster * Config::kBoxK;

    uint32_t row = 0;
    uint32_t n = 0;  // of the step
    // Waits for the step that had this place among the values before, and releases it.
    auto release = [&] {
        shared.values.wait_empty(n);
        if (n >= Config::kStages) { Barrier::arrive(&shared.steps.empty[shared.steps.place(n - Config::kStages)]); }
    };
    for (;; ++n) {
        shared.steps.wait_full(n);
        StepOf<Config> const& step = shared.step[shared.steps.place(n)];
        Work const work = step.work;
        if (work.tile < 0) {
            // Whoever waits for this kernel waits for that too.
            if (Config::kSummaries > 0) { cudaGridDependencySynchronize(); }
            for (auto& queries : shared.queries) {
                queries.wait_empty(row);
                Barrier::arrive(&queries.full[queries.place(row)]);
            }
            break;
        }
        int const place = shared.keys.place(n);
        int const kv_head = work.head / params.kv_group;
        if constexpr (Config::kSummaries > 0) {
            if (step.summaries.block >= 0) {
                constexpr uint32_t kBytes = Config::kSummaries * Config::kHeadDim * sizeof(Element);
                auto copy_summaries = [&](CUtensorMap const& map, uint64_t* full, Element* tiles, int row) {
                    copy_rows<Config, Config::kTileK, 1>(
                        map, full, cute::TMA::CacheHintSm90::EVICT_LAST, tiles + place * Config::kTileK * Config::kHeadDim,
                        row, step.summaries.block, kv_head, work.batch);
                };
                // The kernel that makes them may still run.
                cudaGridDependencySynchronize();
                shared.keys.wait_empty(n);
                CopyBarrier::arrive_and_expect_tx(&shared.keys.full[place], 2 * kBytes);
                copy_summaries(params.mean, &shared.keys.full[place], shared.key, 0);
                copy_summaries(params.variance, &shared.keys.full[place], shared.key, Config::kSummaries);
                release();
                CopyBarrier::arrive_and_expect_tx(&shared.values.full[place], kBytes);
                copy_summaries(params.mean_value, &shared.values.full[place], shared.value, 0);
                continue;
            }
        }
        int token[Config::kBlocks];
        CUTLASS_PRAGMA_UNROLL
        for (int b = 0; b < Config::kBlocks; ++b) {
            int const block = step.visit.block[b];
            token[b] = block >= 0 ? block * kBlockK + part : kPastTheEnd;
        }
        auto copy_tile = [&](CUtensorMap const& map, uint64_t* full, Element* tiles) {
            CopyBarrier::arrive_and_expect_tx(full, kTileBytes);
            CUTLASS_PRAGMA_UNROLL
            for (int b = 0; b < Config::kBlocks; ++b) {
                copy_rows<Config, Config::kTileK, Config::kCluster>(
                    map, full, cute::TMA::CacheHintSm90::EVICT_LAST, tiles + place * Config::kTileK * Config::kHeadDim,
                    b * kBlockK + part, token[b], kv_head, work.batch);
            }
        };
        shared.keys.wait_empty(n);
        copy_tile(params.key, &shared.keys.full[place], shared.key);
        if (step.first) {
            for (int i = 0; i < Config::kConsumers; ++i) {
                auto& queries = shared.queries[i];
                queries.wait_empty(row);
                int const place = queries.place(row);
                CopyBarrier::arrive_and_expect_tx(&queries.full[place], kQueryBytes);
                copy_rows<Config, Config::kRows, 1>(
                    params.query, &queries.full[place], cute::TMA::CacheHintSm90::EVICT_FIRST,
                    shared.query + place * Config::kRows * Config::kHeadDim, i * kQueries,
                    work.tile * Config::kRows + i * kQueries, work.head, work.batch);
            }
            ++row;
        }
        release();
        copy_tile(params.value, &shared.values.full[place], shared.value);
    }
    for (int i = 0; i < Config::kStages; ++i, ++n) { release(); }
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
                if (i / 2 * 8 + i % 2 >= limit) { scores(score_place(b, i, r)) = -INFINITY; }
            }
        }
    }
}

// Reads shared memory in one lane for the whole warp: the lane that also releases it.
template <class T>
CUTLASS_DEVICE T broadcast(T const& shared) {
    constexpr int kWords = sizeof(T) / sizeof(int);
    static_assert(sizeof(T) == kWords * sizeof(int));
    T value;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kWords; ++i) {
        int const word = threadIdx.x % 32 == 0 ? reinterpret_cast<int const*>(&shared)[i] : 0;
        reinterpret_cast<int*>(&value)[i] = __shfl_sync(~0u, word, 0);
    }
    return value;
}

// What a thread knows of its two queries when all of a row of the mask is done.
template <int kHeadDim>
struct Result {
    int head;
    int batch;
    int row;  // the first query
    bool valid[2];
    float lse[2];
    float* lse_state;             // null where the state stays as it is
    uint32_t pairs[kHeadDim / 4];  // of channels of the output: of every 8 one, of both queries
};

// Writes a warp's rows of the output, 16 bytes a lane: lanes of a quad hold pairs of channels of every 8 and exchange them, so that
// each has all of one of four groups of 8.
template <class Config>
CUTLASS_DEVICE void write(KernelParams const& params, Result<Config::kHeadDim> const& result) {
    using Element = typename Config::Element;
    int const lane = threadIdx.x % 4;
    bool const odd = lane & 1;
    bool const upper = lane & 2;
    auto* const first = static_cast<Element*>(params.out.data) + result.batch * params.out.batch_stride +
                        result.head * params.out.head_stride + result.row * params.out.token_stride;
    auto exchange = [](bool second, uint32_t a, uint32_t b, int lane_bit) {
        return __shfl_xor_sync(~0u, second ? a : b, lane_bit);
    };
    CUTLASS_PRAGMA_UNROLL
    for (int group = 0; group < Config::kHeadDim / 8; group += 4) {
        int const channel = (group + lane) * 8;
        CUTLASS_PRAGMA_UNROLL
        for (int r = 0; r < 2; ++r) {
            uint32_t const part[4] = {
                result.pairs[2 * group + r], result.pairs[2 * group + 2 + r], result.pairs[2 * group + 4 + r],
                result.pairs[2 * group + 6 + r]};
            // Of groups 0 and 2, or 1 and 3, the pairs of this lane and its neighbour.
            uint32_t const near[2] = {exchange(odd, part[0], part[1], 1), exchange(odd, part[2], part[3], 1)};
            uint2 const low = odd ? make_uint2(near[0], part[1]) : make_uint2(part[0], near[0]);
            uint2 const high = odd ? make_uint2(near[1], part[3]) : make_uint2(part[2], near[1]);
            uint2 const far = {exchange(upper, low.x, high.x, 2), exchange(upper, low.y, high.y, 2)};
            uint4 const whole = upper ? make_uint4(far.x, far.y, high.x, high.y) : make_uint4(low.x, low.y, far.x, far.y);
            if (result.valid[r] && channel < params.head_dim) {
                *reinterpret_cast<uint4*>(first + 8 * r * params.out.token_stride + channel) = whole;
            }
        }
    }
    CUTLASS_PRAGMA_UNROLL
    for (int r = 0; r < 2; ++r) {
        if (result.valid[r] && lane == 0) {
            int64_t const head = static_cast<int64_t>(result.batch) * params.rows.heads + result.head;
            params.lse[head * params.rows.tokens_q + result.row + 8 * r] = result.lse[r];
            if (result.lse_state != nullptr) { result.lse_state[8 * r] = result.lse[r]; }
        }
    }
}

// The products of a row's queries with means, and of their squares with variances.
template <class Config>
struct SummaryProducts {
    using Element = typename Config::Element;
    using Shape = cute::Shape<cute::Int<Config::kRows>, cute::Int<Config::kSummaries>, cute::Int<Config::kHeadDim>>;
    using MmaQM =
        decltype(cute::make_tiled_mma(cute::GMMA::ss_op_selector<Element, Element, float, Shape>(), typename Config::Warpgroups{}));
    using MmaSV =
        decltype(cute::make_tiled_mma(cute::GMMA::rs_op_selector<Element, Element, float, Shape>(), typename Config::Warpgroups{}));
    // Channels of the squares that fit into registers at a time.
    static constexpr int kSquares = Config::kHeadDim == 256 ? 64 : Config::kHeadDim;
};

// Loads 16 channels of a warp's queries as the first operand of a product, each times `scale` and squared. `part`: this lane's 8
// channels of one query.
template <class Element>
CUTLASS_DEVICE void load_squares(Element const& part, float scale, uint32_t* squares) {
    using Pair = cute::conditional_t<cute::is_same_v<Element, cutlass::bfloat16_t>, __nv_bfloat162, __half2>;
    cute::SM75_U32x4_LDSM_N::copy(
        reinterpret_cast<cute::uint128_t const&>(part), squares[0], squares[1], squares[2], squares[3]);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 4; ++i) {
        Pair pair = reinterpret_cast<Pair const&>(squares[i]);
        // All squares are in the range of bfloat16.
        if constexpr (cute::is_same_v<Pair, __half2>) { pair = __hmul2(pair, __float2half2_rn(scale)); }
        pair = __hmul2(pair, pair);
        squares[i] = reinterpret_cast<uint32_t const&>(pair);
    }
}

// Tells the compiler that nobody needs any more what these registers hold: the products that overwrite them name them as operands.
template <class Fragment>
CUTLASS_DEVICE void forget(Fragment& fragment) {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(fragment); ++i) { asm volatile("" : "=f"(fragment(i))); }
}

template <class Config>
CUTLASS_DEVICE void consume(ParamsOf<Config> const& params, SharedStorage<Config>& shared) {
    using namespace cute;
    using Element = typename Config::Element;
    constexpr Tracking kTracking = Config::kTracking;
    constexpr int kBlocks = Config::kBlocks;
    // Steps after the first in which a causal tile may hide keys.
    constexpr int kCausalSteps = Config::kPasses ? 1 : ceil_div(Config::kRows / kBlockK, kBlocks);
    RowParams const& rows = params.rows;
    int const warpgroup = cutlass::canonical_warp_group_idx() - 1;
    int const warp = threadIdx.x / 32 - kWarpgroup / 32;
    int const lane = threadIdx.x % 32;
    // Place in the tile of the first of this thread's two queries.
    int const row_in_tile = warp * kWarpQ + lane / 4;

    Tensor query = make_tensor(make_smem_ptr(shared.query), typename Config::LayoutQ{});
    Tensor key = make_tensor(make_smem_ptr(shared.key), typename Config::LayoutK{});
    Tensor value = make_tensor(make_smem_ptr(shared.value), typename Config::LayoutVt{});
    using MmaQK = typename Config::template MmaQK<kBlocks>;
    typename Config::MmaPV mma_pv;
    // Descriptors depend on the warpgroup alone.
    auto const slice_pv = mma_pv.get_slice(warpgroup * kWarpgroup);
    auto const slice_qk = MmaQK{}.get_slice(warpgroup * kWarpgroup);
    Tensor q = slice_qk.partition_fragment_A(query);
    Tensor k = slice_qk.partition_fragment_B(key);
    Tensor v = slice_pv.partition_fragment_B(value);
    Tensor scores = partition_fragment_C(MmaQK{}, Shape<Int<Config::kRows>, Int<Config::kTileK>>{});
    Tensor out = partition_fragment_C(mma_pv, Shape<Int<Config::kRows>, Int<Config::kHeadDim>>{});
    // Weights as the first operand of the second product: the order of the scores, 16 keys at a time.
    Tensor weights = make_tensor<Element>(Layout<Shape<Shape<_2, _2, _2>, _1, Int<Config::kTileK / 16>>>{});
    static_assert(decltype(size(scores))::value == kBlocks * 32 && decltype(size(weights))::value == kBlocks * 32);

    auto& words = *reinterpret_cast<uint32_t(*)[kBlocks * 16]>(raw_pointer_cast(weights.data()));

    Softmax<kTracking, kBlocks, Element> softmax(params.scale_log2);
    auto& queries = shared.queries[warpgroup];
    Result<Config::kHeadDim> result;
    uint32_t n_row = 0;
    uint32_t n = 0;  // of the step

    // Empties the n-th place of a ring, for the other thread block of a pair too: its copies come here as well.
    auto empty = [&](auto& ring, uint32_t n) {
        uint64_t& barrier = ring.empty[ring.place(n)];
        __syncwarp();
        if constexpr (Config::kPaired) {
            Barrier::arrive(&barrier, (blockIdx.x + lane) % Config::kCluster, lane < Config::kCluster);
        } else if (lane == 0) {
            Barrier::arrive(&barrier);
        }
    };
    auto take_turn = [&] {
        cutlass::arch::NamedBarrier::sync(2 * kWarpgroup, kTurnBarrier + warpgroup);
    };
    auto pass_turn = [&] {
        cutlass::arch::NamedBarrier::arrive(2 * kWarpgroup, kTurnBarrier + (warpgroup + 1) % Config::kConsumers);
    };
    // Of the first `count` blocks of a tile, whose descriptors are those of the whole.
    auto issue_qk = [&](auto count) {
        typename Config::template MmaQK<count> mma_qk;
        Tensor part = make_tensor(scores.data(), Layout<Shape<Shape<_2, _2, Int<count * 8>>, _1, _1>>{});
        forget(scores);
        warpgroup_arrive();
        mma_qk.accumulate_ = GMMA::ScaleOut::Zero;
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < size<2>(q); ++i) {
            cute::gemm(mma_qk, q(_, _, i, queries.place(n_row)), k(_, _, i, shared.keys.place(n)), part);
            mma_qk.accumulate_ = GMMA::ScaleOut::One;
        }
        warpgroup_commit_batch();
    };
    // Of the first `keys` keys or summaries.
    auto issue_pv = [&](uint32_t n, auto const& weights, int keys) {
        warpgroup_fence_operand(out);
        warpgroup_arrive();
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < keys / 16; ++i) {
            cute::gemm(mma_pv, weights(_, _, i), v(_, _, i, shared.values.place(n)), out);
            mma_pv.accumulate_ = GMMA::ScaleOut::One;
        }
        warpgroup_commit_batch();
    };
    // After the last product that reads a row's queries: the next ones come while it ends.
    auto empty_queries = [&] {
        __syncwarp();
        if (lane == 0) { Barrier::arrive(&queries.empty[queries.place(n_row)]); }
    };
    auto answer = [&](uint32_t n, uint32_t keep) {
        if (kTracking != Tracking::kNone && lane == 0) { shared.step[shared.steps.place(n)].keep[warp] = keep; }
    };

    // Has the summaries of blocks that a row does not visit take part, from step n on. What a tile needs of the tensor cores is under way
    // together with the values of the tile before.
    auto attend_summaries = [&](int tiles) {
        if constexpr (Config::kSummaries > 0) {
            constexpr int kSummaries = Config::kSummaries;
            using Products = SummaryProducts<Config>;
            constexpr int kSquares = Products::kSquares;
            constexpr int kParts = Config::kHeadDim / kSquares;
            typename Products::MmaQM mma_qm;
            typename Products::MmaSV mma_sv;
            auto summaries = [&](int part) {
                return local_tile(key, Shape<Int<kSummaries>, Int<Config::kHeadDim>>{}, make_coord(part, 0, _));
            };
            Tensor mean = mma_qm.get_slice(warpgroup * kWarpgroup).partition_fragment_B(summaries(0));
            Tensor variance = mma_sv.get_slice(warpgroup * kWarpgroup).partition_fragment_B(summaries(1));
            Tensor estimates = partition_fragment_C(mma_qm, Shape<Int<Config::kRows>, Int<kSummaries>>{});
            Tensor variances = partition_fragment_C(mma_qm, Shape<Int<Config::kRows>, Int<kSummaries>>{});
            Tensor squares = make_tensor<Element>(Layout<Shape<Shape<_2, _2, _2>, _1, Int<kSquares / 16>>>{});
            Tensor summary_weights = make_tensor<Element>(Layout<Shape<Shape<_2, _2, _2>, _1, Int<kSummaries / 16>>>{});
            auto& weight_words = *reinterpret_cast<uint32_t(*)[kSummaries / 4]>(raw_pointer_cast(summary_weights.data()));
            auto& square_words = *reinterpret_cast<uint32_t(*)[kSquares / 4]>(raw_pointer_cast(squares.data()));

            auto load_part = [&](int part) {
                CUTLASS_PRAGMA_UNROLL
                for (int i = 0; i < kSquares / 16; ++i) {
                    load_squares<Element>(
                        query(warp * kWarpQ + lane % 16, part * kSquares + 16 * i + lane / 16 * 8, queries.place(n_row)),
                        params.query_scale, square_words + 4 * i);
                }
                warpgroup_fence_operand(squares);
            };
            auto issue_qm = [&] {
                warpgroup_fence_operand(estimates);
                warpgroup_arrive();
                mma_qm.accumulate_ = mma_sv.accumulate_ = GMMA::ScaleOut::Zero;
                CUTLASS_PRAGMA_UNROLL
                for (int i = 0; i < size<2>(q); ++i) {
                    cute::gemm(mma_qm, q(_, _, i, queries.place(n_row)), mean(_, _, i, shared.keys.place(n)), estimates);
                    mma_qm.accumulate_ = GMMA::ScaleOut::One;
                }
                warpgroup_commit_batch();
            };
            auto issue_sv = [&](int part) {
                warpgroup_fence_operand(variances);
                warpgroup_arrive();
                CUTLASS_PRAGMA_UNROLL
                for (int i = 0; i < size<2>(squares); ++i) {
                    int const k = part * kSquares / 16 + i;
                    cute::gemm(mma_sv, squares(_, _, i), variance(_, _, k, shared.keys.place(n)), variances);
                    mma_sv.accumulate_ = GMMA::ScaleOut::One;
                }
                warpgroup_commit_batch();
            };
            if (kParts == 1) { load_part(0); }
            for (int tile = 0; tile < tiles; ++tile, ++n) {
                if (kParts > 1) { load_part(0); }
                shared.keys.wait_full(n);
                take_turn();
                issue_qm();
                issue_sv(0);
                CUTLASS_PRAGMA_UNROLL
                for (int part = 1; part < kParts; ++part) {
                    warpgroup_wait<0>();
                    load_part(part);
                    issue_sv(part);
                }
                if (tile > 0) {
                    warpgroup_fence_operand(summary_weights);
                    shared.values.wait_full(n - 1);
                    issue_pv(n - 1, summary_weights, kSummaries);
                }
                pass_turn();
                warpgroup_wait<0>();
                warpgroup_fence_operand(estimates);
                warpgroup_fence_operand(variances);
                warpgroup_fence_operand(out);
                empty(shared.keys, n);
                if (tile > 0) { empty(shared.values, n - 1); }
                if (tile == tiles - 1) { empty_queries(); }

                StepOf<Config>& step = shared.step[shared.steps.place(n)];
                SummaryTile<kSummaries> const summaries = broadcast(step.summaries);
                softmax.estimate(estimates, variances, params.variance_scale, rows.tokens_k - summaries.block * kBlockK);
                BlockBits<kSummaries> const wanted = softmax.template wanted<kSummaries>(estimates);
                CUTLASS_PRAGMA_UNROLL
                for (int i = 0; i < wanted.kWords; ++i) {
                    uint32_t const come_back = wanted.word[i] & summaries.stand_in.word[i];
                    if (lane == 0 && come_back != 0) { atomicOr(&step.come_back.word[i], come_back); }
                }
                float rescale[2];
                if (softmax.add_estimates(estimates, summaries.stand_in, weight_words, rescale)) {
                    CUTLASS_PRAGMA_UNROLL
                    for (int i = 0; i < size(out); ++i) { out(i) *= rescale[i / 2 % 2]; }
                }
            }
            shared.values.wait_full(n - 1);
            issue_pv(n - 1, summary_weights, kSummaries);
            warpgroup_wait<0>();
            warpgroup_fence_operand(out);
            empty(shared.values, n - 1);
        }
    };

    if (warpgroup == Config::kConsumers - 1) { pass_turn(); }

    for (;; ++n_row) {
        queries.wait_full(n_row);
        Work const work = broadcast(shared.step[shared.steps.place(n)].work);
        if (work.tile < 0) { break; }
        int const first_row = work.tile * Config::kRows + warpgroup * 64;
        int const row = work.tile * Config::kRows + row_in_tile;
        bool const valid[2] = {row < rows.tokens_q, row + 8 < rows.tokens_q};
        float* lse_state = nullptr;
        float lse_before[2] = {INFINITY, INFINITY};
        if constexpr (by_mass(kTracking)) {
            if (work.threshold > -INFINITY) {
                lse_state = params.lse_state + work.batch * params.lse_state_batch_stride +
                            work.head * params.lse_state_head_stride + row;
                CUTLASS_PRAGMA_UNROLL
                for (int r = 0; r < 2; ++r) {
                    if (valid[r]) { lse_before[r] = lse_state[8 * r]; }
                }
            }
        }

        int steps = work.steps;
        if (Config::kPasses && rows.causal) {
            // What only later queries of the row attend comes first.
            CUTLASS_PRAGMA_NO_UNROLL
            for (int own = max(1, reach(rows, first_row + 64)); steps > own; --steps, ++n) {
                shared.keys.wait_full(n);
                empty(shared.keys, n);
                shared.values.wait_full(n);
                empty(shared.values, n);
                take_turn();
                pass_turn();
            }
        }
        shared.keys.wait_full(n);
        Visit<kBlocks> visit = broadcast(shared.step[shared.steps.place(n)].visit);
        int summary_tiles = 0;
        if constexpr (Config::kSummaries > 0) { summary_tiles = broadcast(shared.step[shared.steps.place(n)].summary_tiles); }
        issue_qk(Int<kBlocks>{});
        if (n_row > 0) { write<Config>(params, result); }
        softmax.begin(work.threshold, valid, lse_before);
        mma_pv.accumulate_ = GMMA::ScaleOut::Zero;
        forget(out);
        warpgroup_wait<0>();
        warpgroup_fence_operand(scores);
        empty(shared.keys, n);
        if (steps == 1 && summary_tiles == 0) { empty_queries(); }
        hide(rows, visit, first_row, row, scores);
        softmax.first(scores, words);

        // A tile behind the first, of `count` blocks.
        auto attend = [&](int step, auto count) __attribute__((always_inline)) {
            ++n;
            shared.keys.wait_full(n);
            if (rows.causal && step <= kCausalSteps) { visit = broadcast(shared.step[shared.steps.place(n)].visit); }
            take_turn();
            warpgroup_fence_operand(weights);
            issue_qk(count);
            shared.values.wait_full(n - 1);
            issue_pv(n - 1, weights, Config::kTileK);
            pass_turn();
            // Judging the tile before takes no time of its own while the products are under way.
            answer(n - 1, softmax.judge(words, *static_cast<uint32_t const volatile*>(&shared.zero)));
            warpgroup_wait<0>();
            warpgroup_fence_operand(scores);
            warpgroup_fence_operand(out);
            empty(shared.keys, n);
            empty(shared.values, n - 1);
            if (step == steps - 1 && summary_tiles == 0) { empty_queries(); }
            if (rows.causal && step <= kCausalSteps) { hide(rows, visit, first_row, row, scores); }
            float rescale[2];
            bool const raised = softmax.template step<count>(scores, words, rescale);
            if (raised) {
                CUTLASS_PRAGMA_UNROLL
                for (int i = 0; i < size(out); ++i) { out(i) *= rescale[i / 2 % 2]; }
            }
        };
        auto end = [&](auto count) {
            shared.values.wait_full(n);
            issue_pv(n, weights, count * kBlockK);
            answer(n, softmax.judge(words, 0));
            warpgroup_wait<0>();
            warpgroup_fence_operand(out);
            empty(shared.values, n);
        };
        int const wide_steps = steps - work.narrow_steps;
        for (int step = 1; step < wide_steps; ++step) { attend(step, Int<kBlocks>{}); }
        if (kBlocks == 1 || wide_steps == steps) {
            end(Int<kBlocks>{});
        } else if constexpr (kBlocks > 1) {
            CUTLASS_PRAGMA_NO_UNROLL
            for (int step = wide_steps; step < steps; ++step) { attend(step, Int<kBlocks - 1>{}); }
            end(Int<kBlocks - 1>{});
        }
        ++n;
        if (summary_tiles > 0) { attend_summaries(summary_tiles); }

        // Written while the first product of the next row is under way.
        result = {work.head, work.batch, row, {valid[0], valid[1]}, {}, lse_state, {}};
        float factor[2];
        softmax.end(factor, result.lse);
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < size(out) / 2; ++i) {
            result.pairs[i] = pack(out(2 * i) * factor[i % 2], out(2 * i + 1) * factor[i % 2], Element{});
        }
    }
    write<Config>(params, result);
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1) forward_kernel(__grid_constant__ ParamsOf<Config> const params) {
    // Swizzled tiles repeat every 1024 bytes; dynamic shared memory starts at such an address.
    extern __shared__ __align__(1024) char raw[];
    auto& shared = *reinterpret_cast<SharedStorage<Config>*>(raw);
    if (threadIdx.x == 0) {
        cute::prefetch_tma_descriptor(&params.query);
        cute::prefetch_tma_descriptor(&params.key);
        cute::prefetch_tma_descriptor(&params.value);
        for (auto& queries : shared.queries) { queries.init(1, Config::kConsumerWarps / Config::kConsumers); }
        shared.keys.init(1, Config::kConsumerWarps * Config::kCluster);
        shared.values.init(1, Config::kConsumerWarps * Config::kCluster);
        shared.steps.init(1, 1);
        shared.taken.init(1, 1);
        for (StepOf<Config>& step : shared.step) { step.words = nullptr; }
        shared.zero = 0;
        cutlass::arch::fence_barrier_init();
    }
    // No thread block starts before all barriers of its pair are there, and none ends while the other may still reach its own.
    auto meet = [] {
        if constexpr (Config::kPaired) {
            cute::cluster_sync();
        } else {
            __syncthreads();
        }
    };
    meet();
    if (cutlass::canonical_warp_group_idx() == 0) {
        cutlass::arch::warpgroup_reg_dealloc<Config::kProducerRegisters>();
        int const warp = cutlass::canonical_warp_idx_sync();
        if (warp == 0) {
            int32_t* skipped = nullptr;
            if constexpr (Config::kSummaries > 0) { skipped = params.skipped; }
            plan(params.rows, skipped, shared);
        }
        if (warp == 1 && threadIdx.x % 32 == 0) { fetch<Config>(params, shared); }
        __syncwarp();
    } else {
        cutlass::arch::warpgroup_reg_alloc<Config::kConsumerRegisters>();
        consume<Config>(params, shared);
    }
    if constexpr (Config::kPaired) { meet(); }
}

}  // namespace lite_attention::sm90
