// SPDX-License-Identifier: MIT
// Sizes and the roles of the warps of the decode kernels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "../common/math.h"
#include "../common/ring.h"
#include "../common/warp.h"
#include "params.h"

namespace lite_attention::sm90 {

constexpr int kHeadTile = 8;  // query heads of a matrix product
constexpr int kPlane = 64;    // channels that lie side by side in shared memory, 128 bytes
// Segments of a unit of work where a sequence skips: few blocks of each are visited, and a unit costs its thread block some time.
constexpr int kSkippingSegments = 2;
constexpr int kUnitBlocks = kSegmentBlocks * kSkippingSegments;  // at most
constexpr int kUnitWords = kUnitBlocks / kWordBlocks;
// Blocks that may be listed and not fetched yet when a thread block takes more work: who takes it early may end last.
constexpr int kBacklog = 48;
constexpr int kSharedBytes = 227 * 1024;

template <int kHeadDim_, class Element_, int kHeadTiles_>
struct Config {
    using Element = Element_;
    static constexpr int kHeadDim = kHeadDim_;      // the largest that it takes
    static constexpr int kHeadTiles = kHeadTiles_;  // of kHeadTile query heads each
    static constexpr int kHeads = kHeadTiles * kHeadTile;
    static constexpr int kPlanes = kHeadDim / kPlane;
    static_assert(kPlanes * kPlane == kHeadDim);

    static constexpr int kConsumers = 8;
    // Warps that list what to visit, each a unit of work of its own. One more, and the consumers had 40 registers less.
    static constexpr int kPlanners = 3;
    static constexpr int kThreads = (kConsumers + kPlanners + 1) * kWarp;
    // Channels whose sums over the warps are taken at a time.
    static constexpr int kSlice = kPlane;
    // A row of queries in shared memory: the padding spreads the heads over the banks.
    static constexpr int kQueryRow = kHeadDim + 8;

    // A stage holds the keys and the values of a block. There are as many as shared memory has room for; a multiple of the
    // consumers, so that within a unit each stage is the same warp's, which cannot wait for its next use before the last is over.
    static constexpr int kStageElements = kDecodeBlock * kHeadDim;
    static constexpr int kStageBytes = 2 * kStageElements * 2;
    static constexpr int kOtherBytes =
        kPlanners * (6 * kUnitBlocks + 2 * kHeads * kQueryRow) +
        kConsumers * kSlice * kHeadTile * 4 + kMaxRows * 4 + 4096;
    static constexpr int kStages =
        std::min(40, (kSharedBytes - kOtherBytes) / kStageBytes / kConsumers * kConsumers);
    static_assert(kStages > 0);
};

// A unit of work: one or several segments of a sequence, for one key head.
template <class Config>
struct Unit {
    int row;  // -1: no work is left
    int kv_head;
    int number;       // among those of the row and key head
    int units;        // how many these have
    int first_block;  // of the unit
    int length;       // keys of the row
    int blocks;       // to visit
    bool tracked;     // whether the state is updated
    int page[kUnitBlocks];        // of each block to visit
    uint16_t block[kUnitBlocks];  // how far it is behind the first
    alignas(16) typename Config::Element query[Config::kHeads * Config::kQueryRow];
};

}  // namespace lite_attention::sm90
