// SPDX-License-Identifier: MIT
// The shared-memory plan of the kernel.
#pragma once

#include "score.h"
#include "work.h"

namespace lite_attention::sm90 {

template <class Config>
struct Stage {
    using Element = typename Config::Element;
    alignas(1024) Element key[Config::kStageElements];
    alignas(1024) Element value[Config::kStageElements];

    // What lies there instead of keys and values.
    CUTLASS_DEVICE Summaries<Config>& summaries() {
        static_assert(sizeof(Summaries<Config>) <= sizeof(Stage));
        return reinterpret_cast<Summaries<Config>&>(*this);
    }
};

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
    Stage<Config> stage[Config::kStages];
    Ring<Config::kStages> stages;
    Unit<Config> unit[Config::kUnits];
    Ring<Config::kUnits> units;
    uint32_t turn;  // which unit may be taken next
    int backlog;    // blocks that are listed, or soon will be, and not fetched yet

    // Between the consumers.
    alignas(8) float expected[2][kUnitGroups][Config::kHeads];
    float max[kConsumers][Config::kHeads];
    float sum[kConsumers][Config::kHeads];
    float2 slice[kConsumers][Config::kSlice * kHeadTile / 2];
    Ended ended[2];  // of every other unit

    Schedule schedule;
    int tables[1];  // of the schedule

    // Of everything, for so many rows.
    static constexpr int bytes(int rows) { return static_cast<int>(sizeof(SharedStorage)) + rows * Schedule::kRowBytes; }
};

// Tells a unit's planner that a lane of those who work on it does not need it any more.
template <class Config>
CUTLASS_DEVICE void leave(SharedStorage<Config>& shared, Unit<Config> const& unit) {
    Barrier::arrive(&shared.units.empty[&unit - shared.unit]);
}

CUTLASS_DEVICE void sync_consumers() {
    // CUTLASS counts from the first barrier that it leaves to others: not __syncthreads', which is the hardware's 0.
    cutlass::arch::NamedBarrier::sync(kConsumers * kWarp, 0);
}

}  // namespace lite_attention::sm90
