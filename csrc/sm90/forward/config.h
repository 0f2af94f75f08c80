// SPDX-License-Identifier: MIT
// Tile sizes, the shared-memory plan and the barriers of the forward kernels.
#pragma once

#include <cstdint>

namespace lite_attention::sm90 {

constexpr int kTileQ = 128;  // queries of one head that share a row of the skip mask
constexpr int kBlockK = 64;  // keys that are skipped together

// SUMMARY_BEND of `lite_attention/reference.py`.
constexpr float kSummaryBend = 8.0f;

}  // namespace lite_attention::sm90

#ifdef __CUDACC__

#include <cute/tensor.hpp>

#include "../common/math.h"
#include "../common/ring.h"

namespace lite_attention::sm90 {

// What a pass notes for the next one.
enum class Tracking : int { kNone = 0, kRunningMax = 1, kMass = 2, kMassSummaries = 3 };

// Whether visited blocks are judged by their mass.
constexpr bool by_mass(Tracking tracking) { return tracking == Tracking::kMass || tracking == Tracking::kMassSummaries; }

constexpr int kWarpgroup = 128;
constexpr int kWarpQ = 16;                   // queries of a warp that computes
constexpr int kMaskWarps = kTileQ / kWarpQ;  // that decide on a row of the skip mask
// Product tiles that are planned ahead: enough to hide what it takes to begin a row of the mask.
constexpr int kSteps = 8;

// Named barriers (0 is __syncthreads): turn + i lets consumer i issue its matrix products.
constexpr int kTurnBarrier = 1;

// Warpgroups of a thread block that compute, 64 queries each. The more there are, the better they hide what each waits for, and the
// more queries a fetched block serves; registers and a row of the mask, which is two warpgroups', set the limit. More than two work on
// several rows of the mask side by side, so that all must visit the same.
constexpr int most_consumers(int head_dim, Tracking tracking) {
    return tracking != Tracking::kNone ? 2 : head_dim <= 64 ? 4 : head_dim == 128 ? 3 : 2;
}

// A kernel. `kConsumers_`: warpgroups that compute. `kPaired_`: two thread blocks (a cluster) work side by side on neighbouring tiles
// of queries, and each fetches half of every key block for both. That saves power, and with it time, but each waits for the other.
template <int kHeadDim_, class Element_, Tracking kTracking_, int kConsumers_, bool kPaired_>
struct Config {
    using Element = Element_;
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr Tracking kTracking = kTracking_;
    static constexpr bool kPaired = kPaired_;
    static_assert(!kPaired || kTracking == Tracking::kNone);
    static constexpr int kCluster = kPaired ? 2 : 1;

    static constexpr int kConsumers = kConsumers_;
    static constexpr bool kWide = kConsumers > 2;
    static constexpr int kRows = kConsumers * 64;
    static constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
    static constexpr int kConsumerWarps = kRows / kWarpQ;
    static_assert(kRows == kTileQ || kTracking == Tracking::kNone);

    // Blocks that one product tile gathers, as many as registers hold, and tiles in flight.
    static constexpr int kBlocks = kHeadDim > 128 ? 1 : kConsumers == 2 ? 3 : kConsumers == 3 && kHeadDim <= 64 ? 2 : 1;
    static constexpr int kTileK = kBlocks * kBlockK;
    static constexpr int kStages = kWide ? 4 : kHeadDim == 192 ? 3 : 2;
    // Where a step is one block, and nothing is decided on it, a warpgroup passes over those that its own queries do not attend.
    static constexpr bool kPasses = kBlocks == 1 && kTracking == Tracking::kNone;
    static constexpr int kQueryStages = kWide || kHeadDim < 128 ? 2 : 1;

    // Summaries that one product tile gathers, 0 where none stand in: means and variances share a stage of the keys.
    static constexpr int kSummaries = kTracking != Tracking::kMassSummaries ? 0 : kBlocks > 1 ? 64 : 32;

    static constexpr bool kTight = kBlocks > 1 && kHeadDim > 64;
    static constexpr int kProducerRegisters = kWide ? 32 : kTight ? 24 : 40;
    static constexpr int kConsumerRegisters = kConsumers == 4 ? 112 : kConsumers == 3 ? 160 : kTight ? 240 : 232;
    // A block is launched with the same number for every thread; what the consumers add the producers must have given, or the
    // kernel waits for it for ever.
    static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= (kConsumers + 1) * (65536 / kThreads / 8 * 8));

    // Shared memory holds each tile as planes of kPlane channels, one swizzled row of a plane a token.
    static constexpr int kPlane = kHeadDim % 64 == 0 ? 64 : 32;
    static constexpr int kPlanes = kHeadDim / kPlane;
    static_assert(kPlanes * kPlane == kHeadDim);

    using AtomK = cute::conditional_t<
        kPlane == 64,
        cute::GMMA::Layout_K_SW128_Atom<Element>,
        cute::GMMA::Layout_K_SW64_Atom<Element>>;
    using AtomMN = cute::conditional_t<
        kPlane == 64,
        cute::GMMA::Layout_MN_SW128_Atom<Element>,
        cute::GMMA::Layout_MN_SW64_Atom<Element>>;
    using LayoutQ = decltype(cute::tile_to_shape(
        AtomK{}, cute::Shape<cute::Int<kRows>, cute::Int<kHeadDim>, cute::Int<kQueryStages>>{}));
    using LayoutK = decltype(cute::tile_to_shape(
        AtomK{}, cute::Shape<cute::Int<kTileK>, cute::Int<kHeadDim>, cute::Int<kStages>>{}));
    // The same bytes as LayoutK, seen as (channel, key): the second product contracts over keys.
    using LayoutVt = decltype(cute::tile_to_shape(
        AtomMN{},
        cute::Shape<cute::Int<kHeadDim>, cute::Int<kTileK>, cute::Int<kStages>>{},
        cute::Step<cute::_2, cute::_1, cute::_3>{}));

    using Warpgroups = cute::Layout<cute::Shape<cute::Int<kConsumers>, cute::_1, cute::_1>>;
    template <int kCount>  // blocks
    using MmaQK = decltype(cute::make_tiled_mma(
        cute::GMMA::ss_op_selector<
            Element,
            Element,
            float,
            cute::Shape<cute::Int<kRows>, cute::Int<kCount * kBlockK>, cute::Int<kHeadDim>>>(),
        Warpgroups{}));
    using MmaPV = decltype(cute::make_tiled_mma(
        cute::GMMA::rs_op_selector<
            Element,
            Element,
            float,
            cute::Shape<cute::Int<kRows>, cute::Int<kHeadDim>, cute::Int<kTileK>>,
            cute::GMMA::Major::K,
            cute::GMMA::Major::MN>(),
        Warpgroups{}));

    // Tokens of a block that a thread block fetches.
    static constexpr int kBoxK = kBlockK / kCluster;
};

// A row of the skip mask.
struct Work {
    int tile;  // of queries; -1: no work is left
    int head;
    int batch;
    int steps;        // product tiles to visit, at least one
    int narrow_steps;  // the last of them, of one block less than the others
    float threshold;  // -inf: ordinary attention, the state stays as it is
};

// The blocks of one product tile; -1 where a narrow one or the first one of a row holds fewer.
template <int kBlocks>
struct Visit {
    int block[kBlocks];
};

// A bit for each of some neighbouring blocks.
template <int kCount>
struct BlockBits {
    static constexpr int kWords = kCount / 32;
    uint32_t word[kWords];
};

// The summaries of one product tile.
template <int kSummaries>
struct SummaryTile {
    int block;                       // of the first one; -1: this is a tile of keys
    BlockBits<kSummaries> stand_in;  // those that take part
};

// What a product tile has besides where summaries stand in for blocks that are not visited.
template <int kSummaries>
struct Summarized {
    int summary_tiles;  // that follow in the row
    SummaryTile<kSummaries> summaries;
    BlockBits<kSummaries> come_back;  // blocks that a query wants to visit in the next step
};
template <>
struct Summarized<0> {};

// A product tile from its plan to the writing of what becomes of its blocks.
template <int kBlocks, int kSummaries>
struct Step : Summarized<kSummaries> {
    Work work;  // its row
    Visit<kBlocks> visit;
    int32_t* words;  // the row of the mask, null where it stays as it is
    bool first;      // of its row
    bool last;       // of its row
    bool forced;     // whether a block of the row stays in any case
    // Bits of the blocks that each consumer warp wants to keep.
    alignas(8) uint8_t keep[kMaskWarps];
};

template <class Config>
using StepOf = Step<Config::kBlocks, Config::kSummaries>;

template <class Config>
struct SharedStorage {
    using Element = typename Config::Element;
    alignas(1024) Element query[Config::kQueryStages * Config::kRows * Config::kHeadDim];
    alignas(1024) Element key[Config::kStages * Config::kTileK * Config::kHeadDim];
    alignas(1024) Element value[Config::kStages * Config::kTileK * Config::kHeadDim];

    Ring<Config::kQueryStages> queries[Config::kConsumers];  // each warpgroup has its own, and gives them back when it is done
    Ring<Config::kStages> keys;
    Ring<Config::kStages> values;

    // Planned by one warp, released by the thread that fetches; in between the consumers read and answer them.
    StepOf<Config> step[kSteps];
    Ring<kSteps> steps;
    uint32_t zero;  // see Softmax::judge

    // Rows that the first of paired thread blocks has taken, see Counter. A row is a step or more, and of those neither is more than
    // kSteps ahead of the other.
    Ring<2 * kSteps> taken;
    int row[2 * kSteps];
};

}  // namespace lite_attention::sm90

#endif  // __CUDACC__
