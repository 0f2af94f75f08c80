// SPDX-License-Identifier: MIT
// The shared-memory plan of the kernel that attends.
#pragma once

#include "work.h"

namespace lite_attention::sm90 {

// A unit that is attended to.
struct Ended {
    int row;
    int kv_head;
    int units;  // of the sequence's key head
    int length;
    bool tracked;
    bool last;  // of the sequence's key head
};

template <class Config>
struct SharedStorage {
    using Element = typename Config::Element;
    alignas(1024) Element key[Config::kStages * Config::kStageElements];
    alignas(1024) Element value[Config::kStages * Config::kStageElements];
    Ring<Config::kStages> stages;
    Unit<Config> unit[Config::kPlanners];
    Ring<Config::kPlanners> units;
    uint32_t turn;  // which unit may be taken next
    int backlog;    // blocks that are listed, or soon will be, and not fetched yet

    // Between the consumers.
    float max[Config::kConsumers][Config::kHeads];
    float sum[Config::kConsumers][Config::kHeads];
    float2 slice[Config::kConsumers][Config::kSlice * kHeadTile / 2];
    Ended ended[2];  // of every other unit

    int first_unit[1];  // of each row, and the number of units at the end: rows + 1 of them
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
