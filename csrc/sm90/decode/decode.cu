// SPDX-License-Identifier: MIT
// Compiled once for each head size (LITE_HEAD_DIM) and type (LITE_BFLOAT16).
#include <numeric>

#include "../common/device.h"
#include "../common/tensor_map.h"
#include "combine.h"
#include "estimate.h"
#include "kernel.h"
#include "known.h"
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

// How many key heads' summaries one copy brings: as many as a stage takes and lie side by side.
template <class Config>
int heads_together(DecodeParams const& params) {
    bool const adjoin = params.kv_heads == 1 || params.summaries.head_stride == summary_bytes(params.head_dim);
    return adjoin ? std::gcd(params.kv_heads, EstimateStorage<Config>::kTiles) : 1;
}

// Launches a kernel that begins while the one before still runs, and waits where it needs it.
cudaError_t launch_early(
    void (*kernel)(KernelParams), unsigned thread_blocks, int threads, int shared_bytes, cudaStream_t stream,
    KernelParams const& params) {
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = thread_blocks;
    config.blockDim = threads;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, params);
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
        reinterpret_cast<Counters*>(memory),
        reinterpret_cast<int*>(memory + layout.found_parts),
        reinterpret_cast<int*>(memory + layout.known),
        reinterpret_cast<int*>(memory + layout.found),
        reinterpret_cast<uint32_t*>(memory + layout.visited),
        reinterpret_cast<int*>(memory + layout.list),
        reinterpret_cast<float*>(memory + layout.expected),
        reinterpret_cast<float*>(memory + layout.masses),
        reinterpret_cast<float*>(memory + layout.lse),
        reinterpret_cast<float*>(memory + layout.out),
        layout.words,
        layout.tiles,
        layout.chunks,
        layout.slots,
        layout.heads};
    kernel_params.group = params.heads / params.kv_heads;
    kernel_params.heads_together = heads_together<Config>(params);
    kernel_params.chunks = cutlass::FastDivmod(layout.chunks);
    kernel_params.kv_heads = cutlass::FastDivmod(params.kv_heads);
    kernel_params.page_blocks = cutlass::FastDivmod(params.page_size / kDecodeBlock);
    kernel_params.scale_log2 = params.scale * kLog2E;

    static_assert(sizeof(SharedStorage<Config>) + RowTable::bytes(kMaxRows) <= kSharedBytes);
    static_assert(sizeof(EstimateStorage<Config>) + RowTable::bytes(kMaxRows) <= kSharedBytes);
    int const estimate_bytes = static_cast<int>(sizeof(EstimateStorage<Config>)) + RowTable::bytes(params.rows);
    int const combine_bytes = CombineStorage::bytes(layout.chunks, layout.heads);
    int const attend_bytes = static_cast<int>(sizeof(SharedStorage<Config>)) + RowTable::bytes(params.rows);
    int64_t const parts = static_cast<int64_t>(layout.slots) * params.kv_heads * params.rows;  // at most
    auto const thread_blocks = static_cast<unsigned>(std::min<int64_t>(parts, processors()));
    int const lists = params.rows * params.kv_heads * layout.chunks;
    int const known_blocks = std::min(ceil_div(lists, kKnownWarps), kKnownThreadBlocks);
    // Beside those, so that none has to wait for a multiprocessor.
    int const estimate_blocks = std::max(1, static_cast<int>(thread_blocks) - known_blocks);
    kernel_params.estimating_warps = estimate_blocks * EstimateStorage<Config>::kWarps;
    // Where all chunks are found at once even so: what a warp does one after the other takes long.
    kernel_params.finders_together = kFinders;
    while (kernel_params.finders_together > 1 && int64_t{lists} * kernel_params.finders_together > kFinders * int64_t{thread_blocks}) {
        kernel_params.finders_together /= 2;
    }

    cudaError_t error =
        cudaFuncSetAttribute(estimate_kernel<Config>, cudaFuncAttributeMaxDynamicSharedMemorySize, estimate_bytes);
    if (error == cudaSuccess) {
        error = cudaFuncSetAttribute(attend_kernel<Config>, cudaFuncAttributeMaxDynamicSharedMemorySize, attend_bytes);
    }
    if (error == cudaSuccess) {
        error = cudaFuncSetAttribute(combine_kernel<Config>, cudaFuncAttributeMaxDynamicSharedMemorySize, combine_bytes);
    }
    if (error == cudaSuccess) {
        known_kernel<<<known_blocks, kKnownWarps * kWarp, 0, stream>>>(kernel_params);
        error = cudaGetLastError();
    }
    if (error == cudaSuccess) {
        error = launch_early(
            estimate_kernel<Config>, estimate_blocks, EstimateStorage<Config>::kThreads, estimate_bytes, stream, kernel_params);
    }
    if (error == cudaSuccess) {
        error = launch_early(attend_kernel<Config>, thread_blocks, Config::kThreads, attend_bytes, stream, kernel_params);
    }
    if (error == cudaSuccess) {
        error = launch_early(combine_kernel<Config>, lists, kCombineThreads, combine_bytes, stream, kernel_params);
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
