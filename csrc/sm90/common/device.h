// SPDX-License-Identifier: MIT
#pragma once

#include <cuda_runtime_api.h>

namespace lite_attention::sm90 {

// Streaming multiprocessors of the current device.
inline int processors() {
    int device = 0;
    int count = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count;
}

}  // namespace lite_attention::sm90
