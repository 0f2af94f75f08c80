// SPDX-License-Identifier: MIT
// Tile sizes, the shared-memory plan and the barriers of the forward kernels.
#pragma once

#include <cstdint>

namespace lite_attention::sm90 {

constexpr int kTileQ = 128;  // queries of one head that share a row of the skip mask
constexpr int kBlockK = 64;  // keys that are skipped together

}  // namespace lite_attention::sm90

#ifdef __CUDACC__

#include <cute/tensor.hpp>
#include <cutlass/arch/barrier.h>

namespace lite_attention::sm90 {

// Blocks that hold so many tokens, or tiles that hold so many queries.
CUTLASS_HOST_DEVICE constexpr int ceil_div(int count, int size) { return (count + size - 1) / size; }

// What a pass notes for the next one.
enum class Tracking : int { kNone = 0, kRunningMax = 1, kMass = 2 };

constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2;  // warpgroups, 64 queries each
constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
constexpr int kConsumerWarps = kConsumers * kWarpgroup / 32;
constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = 232;
// A block is launched with the same number for every thread; what the consumers add the producers must have given, or the
// kernel waits for it for ever.
static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= (kConsumers + 1) * (65536 / kThreads / 8 * 8));

// Named barriers (0 is __syncthreads): turn + i lets consumer i issue its matrix products.
constexpr int kTurnBarrier = 1;

template <int kHeadDim_, class Element_>
struct Config {
    using Element = Element_;
    static constexpr int kHeadDim = kHeadDim_;

    // Blocks that one product tile gathers, and tiles in flight.
    static constexpr int kBlocks = kHeadDim <= 64 ? 3 : kHeadDim <= 128 ? 2 : 1;
    static constexpr int kTileK = kBlocks * kBlockK;
    static constexpr int kStages = kHeadDim == 192 ? 3 : 2;
    static constexpr int kQueryStages = kHeadDim <= 128 ? 2 : 1;

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
        AtomK{}, cute::Shape<cute::Int<kTileQ>, cute::Int<kHeadDim>, cute::Int<kQueryStages>>{}));
    using LayoutK = decltype(cute::tile_to_shape(
        AtomK{}, cute::Shape<cute::Int<kTileK>, cute::Int<kHeadDim>, cute::Int<kStages>>{}));
    // The same bytes as LayoutK, seen as (channel, key): the second product contracts over keys.
    using LayoutVt = decltype(cute::tile_to_shape(
        AtomMN{},
        cute::Shape<cute::Int<kHeadDim>, cute::Int<kTileK>, cute::Int<kStages>>{},
        cute::Step<cute::_2, cute::_1, cute::_3>{}));

    using Warpgroups = cute::Layout<cute::Shape<cute::Int<kConsumers>, cute::_1, cute::_1>>;
    using MmaQK = decltype(cute::make_tiled_mma(
        cute::GMMA::ss_op_selector<
            Element,
            Element,
            float,
            cute::Shape<cute::Int<kTileQ>, cute::Int<kTileK>, cute::Int<kHeadDim>>>(),
        Warpgroups{}));
    using MmaPV = decltype(cute::make_tiled_mma(
        cute::GMMA::rs_op_selector<
            Element,
            Element,
            float,
            cute::Shape<cute::Int<kTileQ>, cute::Int<kHeadDim>, cute::Int<kTileK>>,
            cute::GMMA::Major::K,
            cute::GMMA::Major::MN>(),
        Warpgroups{}));
};

// A row of the skip mask on its way from the producer to the consumers.
struct Work {
    int tile;  // of queries; -1: no work is left
    int head;
    int batch;
    int steps;        // product tiles to visit
    float threshold;  // -inf: ordinary attention, the state stays as it is
};

// The blocks of one product tile; -1 where the first tile of a row holds fewer.
template <int kBlocks>
struct Visit {
    int block[kBlocks];
};

// A product tile that the producer has yet to settle in the mask.
template <int kBlocks>
struct LedgerEntry {
    int32_t* words;  // the row of the mask, null where it stays as it is
    Visit<kBlocks> visit;
    bool first;   // of its row
    bool last;    // of its row
    bool forced;  // whether a block of the row stays in any case
};

template <class Config>
struct SharedStorage {
    using Element = typename Config::Element;
    alignas(1024) Element query[Config::kQueryStages * kTileQ * Config::kHeadDim];
    alignas(1024) Element key[Config::kStages * Config::kTileK * Config::kHeadDim];
    alignas(1024) Element value[Config::kStages * Config::kTileK * Config::kHeadDim];

    uint64_t query_full[Config::kQueryStages];
    uint64_t query_empty[Config::kQueryStages];
    uint64_t key_full[Config::kStages];
    uint64_t key_empty[Config::kStages];
    uint64_t value_full[Config::kStages];
    uint64_t value_empty[Config::kStages];

    Work work[Config::kQueryStages];                // travels with the query
    Visit<Config::kBlocks> visit[Config::kStages];  // travels with the keys

    // Which blocks of a product tile each consumer warp wants to keep. It travels back to the producer with the release of
    // the values; a consumer may by then be at the tile that takes the same stage next.
    alignas(8) uint8_t keep[2 * Config::kStages][kConsumerWarps];
    LedgerEntry<Config::kBlocks> ledger[Config::kStages];
    uint32_t zero;  // see Softmax::judge
};

// A place in a ring of stages, and the parity of the round.
template <int kStages>
struct RingPosition {
    int index = 0;
    uint32_t phase = 0;

    // Place in a ring of twice as many.
    CUTLASS_DEVICE int slot() const { return index + (phase ? kStages : 0); }
    CUTLASS_DEVICE int previous_slot() const { return index + (phase ? 0 : kStages); }

    CUTLASS_DEVICE void advance() {
        if (++index == kStages) {
            index = 0;
            phase ^= 1;
        }
    }
};

}  // namespace lite_attention::sm90

#endif  // __CUDACC__
