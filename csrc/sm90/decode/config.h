// SPDX-License-Identifier: MIT
// Sizes, the roles of the warps and the shared-memory plan of the decode kernel.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "../common/math.h"
#include "../common/ring.h"
#include "params.h"

namespace lite_attention::sm90 {

constexpr int kWarp = 32;
constexpr int kHeadTile = 8;   // query heads of a matrix product
constexpr int kPlane = 64;     // channels that lie side by side in shared memory, 128 bytes
constexpr int kWordBlocks = 32;  // blocks of a word of the mask
constexpr int kSegmentWords = kSegmentBlocks / kWordBlocks;
constexpr int kUnits = 3;      // units of work planned ahead
constexpr int kSharedBytes = 227 * 1024;

// Named barriers (0 is __syncthreads).
constexpr int kScorerBarrier = 1;
constexpr int kConsumerBarrier = 2;

template <int kHeadDim_, class Element_, int kHeadTiles_>
struct Config {
    using Element = Element_;
    static constexpr int kHeadDim = kHeadDim_;      // the largest that it takes
    static constexpr int kHeadTiles = kHeadTiles_;  // of kHeadTile query heads each
    static constexpr int kHeads = kHeadTiles * kHeadTile;
    static constexpr int kPlanes = kHeadDim / kPlane;
    static_assert(kPlanes * kPlane == kHeadDim);

    static constexpr int kConsumers = 8;
    // Warps that score: as many as leave the consumers the registers that they need.
    static constexpr int kScorers = kHeadDim * kHeadTiles <= 128 ? 8 : 4;
    static constexpr int kThreads = (kConsumers + kScorers + 1) * kWarp;
    static_assert(kSegmentWords % kScorers == 0);

    // Channels whose sums over the warps are taken at a time.
    static constexpr int kSlice = kPlane;
    // A row of queries in shared memory: the padding spreads the heads over the banks.
    static constexpr int kQueryRow = kHeadDim + 8;

    // A stage holds the keys and the values of a block. There are as many as shared memory has room for; a multiple of the
    // consumers, so that within a unit each stage is the same warp's, which cannot wait for its next use before the last is over.
    static constexpr int kStageElements = kDecodeBlock * kHeadDim;
    static constexpr int kStageBytes = 2 * kStageElements * 2;
    static constexpr int kOtherBytes = kUnits * (5 * kSegmentBlocks + 2 * kHeads * kQueryRow) +
                                       kConsumers * kSlice * kHeadTile * 4 + kMaxRows * 4 + 3072;
    static constexpr int kStages =
        std::min(40, (kSharedBytes - kOtherBytes) / kStageBytes / kConsumers * kConsumers);
    static_assert(kStages > 0);
};

// A segment of a sequence, for one key head.
template <class Config>
struct Unit {
    int row;  // -1: no work is left
    int kv_head;
    int segment;
    int segments;  // of the row
    int length;    // keys of the row
    int slot;
    int blocks;  // to visit
    float threshold;
    bool tracked;  // whether the state is updated
    int page[kSegmentBlocks];       // of each block to visit
    uint8_t block[kSegmentBlocks];  // its number in the segment
    alignas(16) typename Config::Element query[Config::kHeads * Config::kQueryRow];
};

template <class Config>
struct SharedStorage {
    using Element = typename Config::Element;
    alignas(1024) Element key[Config::kStages * Config::kStageElements];
    alignas(1024) Element value[Config::kStages * Config::kStageElements];
    Unit<Config> unit[kUnits];
    Ring<kUnits> units;
    Ring<Config::kStages> stages;

    int drawn;                          // between the scorers: the unit that is next
    int counts[kSegmentWords];          // between the scorers: blocks to visit of each word
    float max[Config::kConsumers][Config::kHeads];  // between the consumers, as the others
    float sum[Config::kConsumers][Config::kHeads];
    float2 slice[Config::kConsumers][Config::kSlice * kHeadTile / 2];
    float lse[Config::kHeads];
    bool last;  // whether all segments of the row and head are done
    int first_unit[1];  // of each row, and the number of units at the end: rows + 1 of them
};

}  // namespace lite_attention::sm90
