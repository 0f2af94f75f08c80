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

// Describes a tensor of 16-bit floats, its first dimension contiguous, in boxes that lie in shared memory with the given swizzle.
// Strides, in elements, begin with the second dimension's. False if the copy engine cannot read it.
template <int kDims>
bool encode_tensor_map(
    CUtensorMap& map, bool bfloat16, void* data, int64_t const (&sizes)[kDims], int64_t const (&strides)[kDims - 1],
    int const (&box)[kDims], CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion) {
    constexpr int kElementBytes = 2;
    cuuint64_t map_sizes[kDims];
    cuuint64_t map_strides[kDims - 1];
    cuuint32_t map_box[kDims];
    cuuint32_t steps[kDims];
    for (int i = 0; i < kDims; ++i) {
        map_sizes[i] = static_cast<cuuint64_t>(sizes[i] > 0 ? sizes[i] : 1);
        map_box[i] = static_cast<cuuint32_t>(box[i]);
        steps[i] = 1;
    }
    for (int i = 0; i < kDims - 1; ++i) {
        // A dimension of one element may come with any stride, also with one that the copy engine refuses.
        map_strides[i] = sizes[i + 1] > 1 ? strides[i] * kElementBytes : 16;
    }
    return tensor_map_encoder()(
               &map, bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, kDims, data, map_sizes,
               map_strides, map_box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, promotion,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace lite_attention::sm90
