// SPDX-License-Identifier: MIT
// What the lanes of a warp do together, and pairs of 16-bit floats as two floats.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace lite_attention::sm90 {

constexpr int kWarp = 32;

// Over a warp; every lane gets the result.
template <class Number, class Join>
__device__ __forceinline__ Number join_lanes(Number value, Join join) {
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) { value = join(value, __shfl_xor_sync(~0u, value, distance)); }
    return value;
}

__device__ __forceinline__ float2 widen(__half2 pair) { return __half22float2(pair); }
__device__ __forceinline__ float2 widen(__nv_bfloat162 pair) { return __bfloat1622float2(pair); }

}  // namespace lite_attention::sm90
