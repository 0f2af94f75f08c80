// SPDX-License-Identifier: MIT
// The shared-memory plan of the kernel that attends.
#pragma once

#include "found.h"

namespace lite_attention::sm90 {

// A part of what is visited of a chunk.
struct Part {
    int row;  // -1: no work is left
    int kv_head;
    int chunk;
    int number;  // among those of the chunk
    int first;   // of its blocks among those of the chunk that are listed
    int blocks;
    int length;       // keys of the row
    bool tracked;     // whether the state is updated
    bool everything;  // whether the row visits all blocks
};

// A block that is visited.
struct alignas(8) Visit {
    int page;
    int block;
};

// A part to be attended to.
template <class Config>
struct Unit {
    Part part;
    Visit list[kSegmentBlocks];
    alignas(16) typename Config::Element query[Config::kHeads * Config::kQueryRow];
};

template <class Config>
struct SharedStorage {
    using Element = typename Config::Element;
    alignas(1024) Element key[Config::kStages * Config::kStageElements];
    alignas(1024) Element value[Config::kStages * Config::kStageElements];
    Ring<Config::kStages> stages;
    Unit<Config> unit[Config::kPlanners];
    Ring<Config::kPlanners> units;
    uint32_t turn;  // which part may be taken next
    int backlog;    // blocks that are listed, or soon will be, and not fetched yet
    FinderStorage finders[kFinders];

    // Between the consumers.
    float max[Config::kConsumers][Config::kHeads];
    float sum[Config::kConsumers][Config::kHeads];
    float2 slice[Config::kConsumers][Config::kSlice * kHeadTile / 2];

    RowTable rows;
};

// Tells a unit's planner that a lane of those who work on it does not need it any more.
template <class Config>
CUTLASS_DEVICE void leave(SharedStorage<Config>& shared, Unit<Config> const& unit) {
    Barrier::arrive(&shared.units.empty[&unit - shared.unit]);
}

template <class Config>
CUTLASS_DEVICE void sync_consumers() {
    // CUTLASS counts from the first barrier that it leaves to others: not __syncthreads', which is the hardware's 0.
    cutlass::arch::NamedBarrier::sync(Config::kConsumers * kWarp, 0);
}

}  // namespace lite_attention::sm90
