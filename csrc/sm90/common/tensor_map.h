// SPDX-License-Identifier: MIT
// How the host describes tensors to the copy engine.
#pragma once

#include <cudaTypedefs.h>

#include <cstdint>

namespace lite_attention::sm90 {

// The driver's function that makes tensor maps, null where it has none.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
    static PFN_cuTensorMapEncodeTiled_v12000 const encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found;
        cudaError_t const error =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
        bool const usable = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
        return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(usable ? function : nullptr);
    }();
    return encode;
}

// Describes a tensor of 16-bit floats with four dimensions, the first contiguous, in boxes of box0 x box1 x 1 x 1 that lie in
// shared memory with the given swizzle. Strides in elements. False if the copy engine cannot read it.
inline bool encode_tensor_map(
    CUtensorMap& map, bool bfloat16, void* data, int64_t const (&sizes)[4], int64_t const (&strides)[3], int box0, int box1,
    CUtensorMapSwizzle swizzle) {
    constexpr int kElementBytes = 2;
    cuuint64_t map_sizes[4];
    cuuint64_t map_strides[3];
    for (int i = 0; i < 4; ++i) { map_sizes[i] = static_cast<cuuint64_t>(sizes[i] > 0 ? sizes[i] : 1); }
    for (int i = 0; i < 3; ++i) {
        // A dimension of one element may come with any stride, also with one that the copy engine refuses.
        map_strides[i] = sizes[i + 1] > 1 ? strides[i] * kElementBytes : 16;
    }
    cuuint32_t const box[4] = {static_cast<cuuint32_t>(box0), static_cast<cuuint32_t>(box1), 1, 1};
    cuuint32_t const steps[4] = {1, 1, 1, 1};
    return tensor_map_encoder()(
               &map, bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4, data, map_sizes,
               map_strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Streaming multiprocessors of the current device.
inline int processors() {
    int device = 0;
    int count = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count;
}

}  // namespace lite_attention::sm90
