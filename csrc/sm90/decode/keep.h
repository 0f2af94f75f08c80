// SPDX-License-Identifier: MIT
// Access to what the kernels of a decode step leave for one another, and to the little that each of them asks for. While keys or
// summaries come, whatever is not in the L2 cache takes some 5 us, so it is marked to be evicted last.
#pragma once

#include <cute/arch/copy_sm90_desc.hpp>

#include "../common/math.h"
#include "../common/warp.h"

namespace lite_attention::sm90 {

constexpr uint64_t kKeep = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_LAST);

CUTLASS_DEVICE int load_kept(int const* address) {
    int value;
    asm volatile("ld.global.L2::cache_hint.b32 %0, [%1], %2;" : "=r"(value) : "l"(address), "l"(kKeep));
    return value;
}
CUTLASS_DEVICE float load_kept(float const* address) { return __int_as_float(load_kept(reinterpret_cast<int const*>(address))); }

CUTLASS_DEVICE void store_kept(int* address, int value) {
    asm volatile("st.global.L2::cache_hint.b32 [%0], %1, %2;" ::"l"(address), "r"(value), "l"(kKeep) : "memory");
}
CUTLASS_DEVICE void store_kept(float* address, float value) {
    store_kept(reinterpret_cast<int*>(address), __float_as_int(value));
}
// 8-byte aligned.
CUTLASS_DEVICE void store_kept(float* address, float2 value) {
    asm volatile("st.global.L2::cache_hint.v2.b32 [%0], {%1, %2}, %3;" ::"l"(address), "f"(value.x), "f"(value.y), "l"(kKeep)
                 : "memory");
}

// Loads what others may have written since this kernel began.
CUTLASS_DEVICE uint32_t load_acquire(uint32_t const* address) {
    uint32_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}
CUTLASS_DEVICE unsigned long long load_acquire(unsigned long long const* address) {
    unsigned long long value;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
    return value;
}

// Has the L2 cache fetch what stands there. Runs in a warp.
CUTLASS_DEVICE void prefetch(void const* address, int bytes) {
    constexpr int kLine = 128;
    for (int at = threadIdx.x % kWarp * kLine; at < bytes; at += kWarp * kLine) {
        asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<uint8_t const*>(address) + at));
    }
}

}  // namespace lite_attention::sm90
