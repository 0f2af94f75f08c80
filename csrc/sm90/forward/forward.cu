// SPDX-License-Identifier: MIT
// Compiled once for each head size (LITE_HEAD_DIM) and type (LITE_BFLOAT16).
#include <algorithm>
#include <cmath>

#include "../common/device.h"
#include "../common/tensor_map.h"
#include "kernel.h"
#include "launch.h"
#include "order.h"

namespace lite_attention::sm90 {
namespace {

// Keys and values of the heads that are worked on at a time are to take about half of the L2 cache.
constexpr int64_t kGroupBytes = 24 << 20;

// Describes a tensor to the copy engine, in boxes of one plane of channels and `box_tokens` tokens.
template <class Config>
bool encode(
    CUtensorMap& map, TensorView const& view, int64_t tokens, int heads, int batch, int head_dim, int box_tokens) {
    constexpr auto kSwizzle = Config::kPlane == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
    return encode_tensor_map<4>(
        map, cute::is_same_v<typename Config::Element, cutlass::bfloat16_t>, view.data, {head_dim, tokens, heads, batch},
        {view.token_stride, view.head_stride, view.batch_stride}, {Config::kPlane, box_tokens, 1, 1}, kSwizzle,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B);
}

// The three parts of the summaries, each a tensor with a token a block.
template <class Config>
bool encode_summaries(SummaryKernelParams& kernel_params, ForwardParams const& params) {
    int const blocks = ceil_div(params.tokens_k, kBlockK);
    int64_t const token_stride = static_cast<int64_t>(params.kv_heads) * params.head_dim;
    auto* part = static_cast<typename Config::Element*>(params.summaries);
    bool encoded = true;
    for (CUtensorMap* const map : {&kernel_params.mean, &kernel_params.variance, &kernel_params.mean_value}) {
        // No key: as in `launch`.
        TensorView const view =
            blocks > 0 ? TensorView{part, blocks * token_stride, token_stride, params.head_dim} : params.query;
        encoded = encoded && encode<Config>(
            *map, view, blocks, params.kv_heads, params.batch, params.head_dim, Config::kSummaries);
        part += params.batch * blocks * token_stride;
    }
    return encoded;
}

template <class Config>
char const* launch(ForwardParams const& params, cudaStream_t stream) {
    using Element = typename Config::Element;
    // No key: what is read lies past the end, where the map of any tensor gives zeros.
    TensorView const& key = params.tokens_k > 0 ? params.key : params.query;
    TensorView const& value = params.tokens_k > 0 ? params.value : params.query;
    ParamsOf<Config> kernel_params;
    bool encoded =
        encode<Config>(
            kernel_params.query, params.query, params.tokens_q, params.heads, params.batch, params.head_dim,
            Config::kRows / Config::kConsumers) &&
        encode<Config>(
            kernel_params.key, key, params.tokens_k, params.kv_heads, params.batch, params.head_dim, Config::kBoxK) &&
        encode<Config>(
            kernel_params.value, value, params.tokens_k, params.kv_heads, params.batch, params.head_dim, Config::kBoxK);
    if constexpr (Config::kSummaries > 0) {
        encoded = encoded && encode_summaries<Config>(kernel_params, params);
        kernel_params.skipped = params.skipped;
        // A power of two, which rounds nothing.
        float const query_scale = std::clamp(std::exp2(std::floor(std::log2(params.scale))), 0x1p-14f, 1.0f);
        bool const scaled = cute::is_same_v<Element, cutlass::half_t>;
        float const rest = scaled ? params.scale / query_scale : params.scale;
        kernel_params.query_scale = query_scale;
        kernel_params.variance_scale = kLog2E * kLog2E * kSummaryBend * rest * rest;
    }
    if (!encoded) { return "the copy engine refuses a tensor: expected 16-byte aligned data and strides"; }

    int const tiles = ceil_div(params.tokens_q, Config::kRows * Config::kCluster);
    int const kv_group = params.heads / params.kv_heads;
    int64_t const head_bytes = 2 * sizeof(Element) * static_cast<int64_t>(params.tokens_k) * params.head_dim;
    int64_t const all_kv_heads = static_cast<int64_t>(params.kv_heads) * params.batch;
    int64_t const near_kv_heads = std::clamp<int64_t>(kGroupBytes / std::max<int64_t>(head_bytes, 1), 1, all_kv_heads);
    // Not a smaller group last: its longest causal row would be what all wait for.
    int64_t const groups = all_kv_heads / near_kv_heads;
    int64_t const kv_heads = (all_kv_heads + groups - 1) / groups;
    kernel_params.rows = {
        params.mask,
        params.mask_batch_stride,
        params.mask_head_stride,
        params.mask_tile_stride,
        params.thresholds,
        params.must_visit,
        params.must_skip,
        params.schedule,
        nullptr,
        params.tokens_q,
        params.tokens_k,
        Config::kRows,
        tiles,
        params.heads,
        params.batch,
        static_cast<int>(kv_heads) * kv_group,
        params.causal};
    kernel_params.out = params.out;
    kernel_params.head_dim = params.head_dim;
    kernel_params.lse = params.lse;
    kernel_params.lse_state = params.lse_state;
    kernel_params.lse_state_batch_stride = params.lse_state_batch_stride;
    kernel_params.lse_state_head_stride = params.lse_state_head_stride;
    kernel_params.kv_group = kv_group;
    kernel_params.scale_log2 = params.scale * kLog2E;

    auto const kernel = forward_kernel<Config>;
    constexpr int kSharedBytes = sizeof(SharedStorage<Config>);
    static_assert(kSharedBytes <= 227 * 1024);
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    if (error == cudaSuccess && Config::kTracking != Tracking::kNone) {
        kernel_params.rows.order = params.schedule + 1;
        bool const near = head_bytes * params.kv_heads * params.batch <= kGroupBytes;
        error = order_rows(kernel_params.rows, params.visited, near, stream);
    } else if (error == cudaSuccess) {
        error = cudaMemsetAsync(params.schedule, 0, sizeof(int), stream);
    }
    if constexpr (Config::kSummaries > 0) {
        SummarizeBlocksParams const blocks = {
            params.key, params.value, params.must_skip, params.summaries, params.batch, params.tokens_k, params.kv_heads,
            params.head_dim, params.dtype};
        char const* const failure = error == cudaSuccess ? summarize_blocks(blocks, stream) : nullptr;
        if (failure != nullptr) { return failure; }
    }
    if (error == cudaSuccess) {
        cudaLaunchAttribute attributes[2]{};
        attributes[0].id = cudaLaunchAttributeClusterDimension;
        attributes[0].val.clusterDim = {Config::kCluster, 1, 1};
        // Begins beside the kernel before, which summarizes blocks or orders rows, and waits where it needs what that writes.
        attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[1].val.programmaticStreamSerializationAllowed = 1;
        cudaLaunchConfig_t config{};
        int64_t const rows = static_cast<int64_t>(tiles) * params.heads * params.batch;
        config.gridDim = static_cast<unsigned>(std::min<int64_t>(rows, processors() / Config::kCluster)) * Config::kCluster;
        config.blockDim = Config::kThreads;
        config.dynamicSmemBytes = kSharedBytes;
        config.stream = stream;
        config.attrs = attributes;
        config.numAttrs = Config::kTracking != Tracking::kNone ? 2 : 1;
        error = cudaLaunchKernelEx(&config, kernel, kernel_params);
    }
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Whether pairs of thread blocks are faster: there is much to fetch, and hardly a tile of queries is left without a partner. Of
// causal tiles the longer one's keys are fetched for both. Measured at 4,096 and 16,384 keys (docs/kernel-notes.md).
template <class Config>
bool pays_paired(ForwardParams const& params) {
    int const tiles = ceil_div(params.tokens_q, Config::kRows);
    int const mean_keys = params.tokens_k - (params.causal ? std::min(params.tokens_q, params.tokens_k) / 2 : 0);
    return mean_keys >= 8192 && (Config::kPasses || !params.causal) && (tiles % 2 == 0 || tiles >= 32);
}

// Queries that a multiprocessor works on if all have the same number of tiles: a last wave that is not full takes as long as a full one.
template <class Config>
int queries_in_waves(ForwardParams const& params) {
    int const tiles = ceil_div(params.tokens_q, Config::kRows) * params.heads * params.batch;
    return ceil_div(tiles, processors()) * Config::kRows;
}

// Whether lower tiles fill their waves so much better that they are faster, though beyond head_dim 64 each query takes longer in them
// (measured, docs/kernel-notes.md), the more so the fewer keys there are for what each tile begins and ends with. Causal tiles differ
// in length and fill each other's gaps.
template <class Low, class High>
bool pays_low(ForwardParams const& params) {
    double const cost = High::kHeadDim <= 64 ? 0.98 : 1.015 + 160.0 / std::max(params.tokens_k, 1);  // of a query, relative
    return !params.causal && cost * queries_in_waves<Low>(params) < queries_in_waves<High>(params);
}

}  // namespace

template <int kHeadDim, bool kBFloat16, int kTracking>
char const* launch(ForwardParams const& params, cudaStream_t stream) {
    using Element = cute::conditional_t<kBFloat16, cutlass::bfloat16_t, cutlass::half_t>;
    constexpr auto kWhat = static_cast<Tracking>(kTracking);
    if (tensor_map_encoder() == nullptr) { return "the CUDA driver is too old: it has no tensor maps"; }
    constexpr int kMost = most_consumers(kHeadDim, kWhat);
    using High = Config<kHeadDim, Element, kWhat, kMost, false>;
    if constexpr (High::kWide) {
        using Low = Config<kHeadDim, Element, kWhat, kMost - 1, false>;
        if (pays_low<Low, High>(params)) { return launch<Low>(params, stream); }
    }
    if constexpr (kWhat == Tracking::kNone && 64 < kHeadDim && kHeadDim <= 128) {
        using Paired = Config<kHeadDim, Element, kWhat, kMost, true>;
        if (pays_paired<Paired>(params)) { return launch<Paired>(params, stream); }
    }
    return launch<High>(params, stream);
}

template char const* launch<LITE_HEAD_DIM, LITE_BFLOAT16, 0>(ForwardParams const&, cudaStream_t);
template char const* launch<LITE_HEAD_DIM, LITE_BFLOAT16, 1>(ForwardParams const&, cudaStream_t);
template char const* launch<LITE_HEAD_DIM, LITE_BFLOAT16, 2>(ForwardParams const&, cudaStream_t);
template char const* launch<LITE_HEAD_DIM, LITE_BFLOAT16, 3>(ForwardParams const&, cudaStream_t);

}  // namespace lite_attention::sm90
