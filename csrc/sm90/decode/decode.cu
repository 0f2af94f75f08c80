// SPDX-License-Identifier: MIT
// Compiled once for each head size (LITE_HEAD_DIM) and type (LITE_BFLOAT16).
#include "../common/device.h"
#include "../common/tensor_map.h"
#include "kernel.h"
#include "launch.h"
#include "workspace.h"

namespace lite_attention::sm90 {
namespace {

// Describes keys or values to the copy engine as planes of channels, in boxes of one block. Where head_dim is no multiple of a
// plane, a box is of one plane only, and what a head lacks is zero.
bool encode(CUtensorMap& map, DecodeParams const& params, PagedView const& view, int box_planes) {
    int64_t const planes = ceil_div(params.head_dim, kPlane);
    return encode_tensor_map<5>(
        map, params.dtype == DType::kBFloat16, view.data,
        {box_planes > 1 ? kPlane : params.head_dim, params.page_size, box_planes > 1 ? planes : 1, params.kv_heads, params.pages},
        {view.token_stride, kPlane, view.head_stride, view.page_stride}, {kPlane, kDecodeBlock, box_planes, 1, 1},
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B);
}

// Sets what the thread blocks count in the workspace to zero.
__global__ void reset_kernel(uint32_t* counters, int count) {
    cudaTriggerProgrammaticLaunchCompletion();
    int const i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) { counters[i] = 0; }
}

template <class Config>
char const* launch(DecodeParams const& params, cudaStream_t stream) {
    KernelParams kernel_params{};
    kernel_params.box_planes = params.head_dim == Config::kHeadDim ? Config::kPlanes : 1;
    if (!encode(kernel_params.key, params, params.key, kernel_params.box_planes) ||
        !encode(kernel_params.value, params, params.value, kernel_params.box_planes)) {
        return "the copy engine refuses the cache: expected 16-byte aligned data and strides";
    }
    WorkspaceLayout const layout(
        params.rows, params.heads, params.kv_heads, params.head_dim,
        static_cast<int64_t>(params.row_pages) * params.page_size);
    auto* const memory = static_cast<uint8_t*>(params.workspace);
    kernel_params.call = params;
    kernel_params.workspace = {
        reinterpret_cast<uint32_t*>(memory),
        reinterpret_cast<uint32_t*>(memory + layout.ended),
        reinterpret_cast<uint32_t*>(memory + layout.estimated),
        reinterpret_cast<uint32_t*>(memory + layout.visited),
        reinterpret_cast<float*>(memory + layout.expected),
        reinterpret_cast<float*>(memory + layout.masses),
        reinterpret_cast<float*>(memory + layout.lse),
        reinterpret_cast<float*>(memory + layout.out),
        layout.words,
        layout.segments,
        layout.heads};
    kernel_params.group = params.heads / params.kv_heads;
    kernel_params.scale_log2 = params.scale * kLog2E;

    static_assert(SharedStorage<Config>::bytes(kMaxRows) <= kSharedBytes);
    int const shared_bytes = SharedStorage<Config>::bytes(params.rows);
    int64_t const units = static_cast<int64_t>(layout.segments) * params.kv_heads * params.rows;
    auto const thread_blocks = static_cast<unsigned>(std::min<int64_t>(units, processors()));

    cudaError_t error = cudaFuncSetAttribute(decode_kernel<Config>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error == cudaSuccess) {
        constexpr int kThreads = 256;
        int const counters = static_cast<int>(layout.visited / sizeof(uint32_t));
        reset_kernel<<<ceil_div(counters, kThreads), kThreads, 0, stream>>>(kernel_params.workspace.drawn, counters);
        error = cudaGetLastError();
    }
    if (error == cudaSuccess) {
        // Begins while the kernel before still runs, and waits where it needs it.
        cudaLaunchAttribute early{};
        early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        early.val.programmaticStreamSerializationAllowed = 1;
        cudaLaunchConfig_t config{};
        config.gridDim = thread_blocks;
        config.blockDim = Config::kThreads;
        config.dynamicSmemBytes = shared_bytes;
        config.stream = stream;
        config.attrs = &early;
        config.numAttrs = 1;
        error = cudaLaunchKernelEx(&config, decode_kernel<Config>, kernel_params);
    }
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

template <int kHeadDim, bool kBFloat16>
char const* launch_decode(DecodeParams const& params, cudaStream_t stream) {
    using Element = std::conditional_t<kBFloat16, __nv_bfloat16, __half>;
    if (tensor_map_encoder() == nullptr) { return "the CUDA driver is too old: it has no tensor maps"; }
    return params.heads / params.kv_heads <= kHeadTile ? launch<Config<kHeadDim, Element, 1>>(params, stream)
                                                       : launch<Config<kHeadDim, Element, 2>>(params, stream);
}

template char const* launch_decode<LITE_HEAD_DIM, LITE_BFLOAT16>(DecodeParams const&, cudaStream_t);

}  // namespace lite_attention::sm90
