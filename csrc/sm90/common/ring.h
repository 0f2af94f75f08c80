// SPDX-License-Identifier: MIT
// Barriers between the warps of a thread block.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cstdint>

namespace lite_attention::sm90 {

using Barrier = cutlass::arch::ClusterBarrier;
using CopyBarrier = cutlass::arch::ClusterTransactionBarrier;

// The barriers of a ring of stages. The n-th use of the ring is at place n modulo kStages; one side fills it, the other empties
// it. Those who wait count for themselves.
template <int kStages>
struct Ring {
    uint64_t full[kStages];
    uint64_t empty[kStages];

    CUTLASS_DEVICE static int place(uint32_t n) { return n % kStages; }
    CUTLASS_DEVICE void wait_full(uint32_t n) { Barrier::wait(&full[place(n)], n / kStages & 1); }
    CUTLASS_DEVICE bool is_full(uint32_t n) { return Barrier::test_wait(&full[place(n)], n / kStages & 1, true); }
    // Until the use before, kStages ago, is over.
    CUTLASS_DEVICE void wait_empty(uint32_t n) { Barrier::wait(&empty[place(n)], n / kStages & 1 ^ 1); }

    // How many arrivals fill a stage, and how many empty it.
    CUTLASS_DEVICE void init(int fills, int empties) {
        for (int i = 0; i < kStages; ++i) {
            Barrier::init(&full[i], fills);
            Barrier::init(&empty[i], empties);
        }
    }
};

}  // namespace lite_attention::sm90
