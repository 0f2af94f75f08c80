// SPDX-License-Identifier: MIT
// Sizes and the roles of the warps of the decode kernel that attends.
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
constexpr int kPartBlocks = 64;  // of a part of a list, see parts_of
// Blocks that may be listed and not fetched yet when a thread block takes more work: who takes it early may end last.
constexpr int kBacklog = 24;
constexpr int kSharedBytes = 227 * 1024;
constexpr int kFinders = 4;  // warps that list what estimates find, see found.h

template <int kHeadDim_, class Element_, int kHeadTiles_>
struct Config {
    using Element = Element_;
    static constexpr int kHeadDim = kHeadDim_;      // the largest that it takes
    static constexpr int kHeadTiles = kHeadTiles_;  // of kHeadTile query heads each
    static constexpr int kHeads = kHeadTiles * kHeadTile;
    static constexpr int kPlanes = kHeadDim / kPlane;
    static_assert(kPlanes * kPlane == kHeadDim);

    static constexpr int kConsumers = 8;
    // Warps that look up what to visit, each a part of its own.
    static constexpr int kPlanners = 3;
    static constexpr int kThreads = (kConsumers + kPlanners + 1 + kFinders) * kWarp;
    static constexpr int kConsumerRegisters = kHeadDim * kHeadTiles <= 128 ? 144 : 168;
    static constexpr int kOtherRegisters = 256 - kConsumerRegisters;
    static_assert(kConsumers * kConsumerRegisters + (kPlanners + 1 + kFinders) * kOtherRegisters <= 65536 / kWarp);
    // Channels whose sums over the warps are taken at a time.
    static constexpr int kSlice = kPlane;
    // A row of queries in shared memory: the padding spreads the heads over the banks.
    static constexpr int kQueryRow = kHeadDim + 8;

    // A stage holds the keys and the values of a block. What is under way keeps memory busy, and more would only make everything
    // else wait for it. Stages are a multiple of the consumers, so that within a unit each stage is the same warp's, which cannot
    // wait for its next use before the last is over.
    static constexpr int kStageElements = kDecodeBlock * kHeadDim;
    static constexpr int kStageBytes = 2 * kStageElements * 2;
    static constexpr int kOtherBytes =
        kPlanners * (8 * kSegmentBlocks + 2 * kHeads * kQueryRow) +
        kConsumers * kSlice * kHeadTile * 4 + kMaxRows * 8 + 4096;
    static constexpr int kUnderWay = 128 * 1024;
    static constexpr int kStages = std::min(kUnderWay, kSharedBytes - kOtherBytes) / kStageBytes / kConsumers * kConsumers;
    static_assert(kStages > 0);
};

}  // namespace lite_attention::sm90
