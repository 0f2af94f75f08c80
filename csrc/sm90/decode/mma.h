// SPDX-License-Identifier: MIT
// Matrix products of a warp, and what prepares their operands. Keys, blocks or channels are rows and query heads columns: a thread
// holds the heads 2 * (lane % 4) and the one after, at rows lane / 4 and 8 further.
#pragma once

#include "config.h"

namespace lite_attention::sm90 {

// d += a * b for 16 x 16 and 16 x 8 matrices.
CUTLASS_DEVICE void mma(float (&d)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1, __half) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
CUTLASS_DEVICE void mma(float (&d)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

CUTLASS_DEVICE uint32_t bits(__half2 pair) { return reinterpret_cast<uint32_t const&>(pair); }
CUTLASS_DEVICE __half2 halves(uint32_t pair) { return reinterpret_cast<__half2 const&>(pair); }

// word & mask | more in one instruction: the compiler takes two, one for each constant.
CUTLASS_DEVICE uint32_t and_or(uint32_t word, uint32_t mask, uint32_t more) {
    uint32_t result;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(word), "r"(mask), "r"(more));
    return result;
}

CUTLASS_DEVICE uint32_t pack(float low, float high, __half) { return bits(__floats2half2_rn(low, high)); }
CUTLASS_DEVICE uint32_t pack(float low, float high, __nv_bfloat16) {
    __nv_bfloat162 const pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<uint32_t const&>(pair);
}

// Four 8 x 8 matrices from shared memory; lanes 8 i to 8 i + 7 give the rows of the i-th.
CUTLASS_DEVICE void load_matrices(uint32_t (&matrices)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(address));
}
CUTLASS_DEVICE void load_transposed(uint32_t (&matrices)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(address));
}
CUTLASS_DEVICE uint32_t transpose(uint32_t matrix) {
    uint32_t transposed;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(matrix));
    return transposed;
}

CUTLASS_DEVICE float add(float a, float b) { return a + b; }

// Over the eight lanes that hold other rows of the same heads.
template <class Join>
CUTLASS_DEVICE float join_rows(float value, Join join) {
    CUTLASS_PRAGMA_UNROLL
    for (int distance = 4; distance < kWarp; distance *= 2) {
        value = join(value, __shfl_xor_sync(~0u, value, distance));
    }
    return value;
}

}  // namespace lite_attention::sm90
