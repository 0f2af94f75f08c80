// SPDX-License-Identifier: MIT
// Summaries of blocks of keys and values, as `lite_attention/reference.py`, `summarize_blocks`: everything is read once.
#include "../common/math.h"
#include "../common/warp.h"
#include "config.h"
#include "params.h"

namespace lite_attention::sm90 {
namespace {

constexpr int kWarps = 4;
constexpr int kChannels = 8;                     // of a lane: 16 bytes
constexpr int kSliceLanes = 8;                   // that read neighbouring channels of a token: 128 bytes
constexpr int kSlice = kSliceLanes * kChannels;  // channels of a warp
constexpr int kTokens = kWarp / kSliceLanes;     // that a warp reads at a time
constexpr int kReads = kBlockK / kTokens;

template <class Pair>
struct Channels {
    uint4 words{};
    __device__ __forceinline__ float2 pair(int i) const { return widen(reinterpret_cast<Pair const*>(&words)[i]); }
};

template <class Pair>
__device__ __forceinline__ Pair narrow(float2 pair);
template <>
__device__ __forceinline__ __half2 narrow(float2 pair) { return __float22half2_rn(pair); }
template <>
__device__ __forceinline__ __nv_bfloat162 narrow(float2 pair) { return __float22bfloat162_rn(pair); }

// The largest number of a type.
__device__ __forceinline__ float largest_of(__half2) { return 65504.0f; }
__device__ __forceinline__ float largest_of(__nv_bfloat162) { return 0x1.fep127f; }

// Sums over the lanes that hold the same channels of other tokens.
__device__ __forceinline__ float join_tokens(float sum) {
#pragma unroll
    for (int distance = kSliceLanes; distance < kWarp; distance *= 2) { sum += __shfl_xor_sync(~0u, sum, distance); }
    return sum;
}

// A warp for each slice of channels of a block and key head.
template <class Pair>
__global__ void __launch_bounds__(kWarps * kWarp) summarize_kernel(SummarizeBlocksParams const params) {
    int const lane = threadIdx.x % kWarp;
    int const slices = ceil_div(params.head_dim, kSlice);
    int const blocks = ceil_div(params.tokens_k, kBlockK);
    int64_t const index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
    int const slice = static_cast<int>(index % slices);
    int64_t const row = index / slices;  // (batch, block, key head)
    if (row >= static_cast<int64_t>(params.batch) * blocks * params.kv_heads) { return; }
    int const head = static_cast<int>(row % params.kv_heads);
    int const block = static_cast<int>(row / params.kv_heads % blocks);
    int const batch = static_cast<int>(row / params.kv_heads / blocks);
    int const channel = slice * kSlice + lane % kSliceLanes * kChannels;
    bool const here = channel < params.head_dim;
    bool const skipped = params.must_skip != nullptr && (params.must_skip[block / 32] >> block % 32 & 1);
    int const tokens = skipped ? 0 : min(kBlockK, params.tokens_k - block * kBlockK);

    auto load = [&](TensorView const& view, int token) {
        auto const* const data = static_cast<uint16_t const*>(view.data) + batch * view.batch_stride +
                                 (static_cast<int64_t>(block) * kBlockK + token) * view.token_stride +
                                 head * view.head_stride + channel;
        Channels<Pair> loaded;
        if (here && token < tokens) { loaded.words = __ldg(reinterpret_cast<uint4 const*>(data)); }
        return loaded;
    };
    // Squares of distances from any key of the block: next to those, what is lost by their sum's own distance is little.
    Channels<Pair> const origin = load(params.key, 0);
    float2 sum[4]{};
    float2 squares[4]{};
    float2 values[4]{};
#pragma unroll 8
    for (int i = 0; i < kReads; ++i) {
        int const token = i * kTokens + lane / kSliceLanes;
        Channels<Pair> const key = load(params.key, token);
        Channels<Pair> const value = load(params.value, token);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            if (token < tokens) {
                float2 const off = {key.pair(c).x - origin.pair(c).x, key.pair(c).y - origin.pair(c).y};
                sum[c] = {sum[c].x + off.x, sum[c].y + off.y};
                squares[c] = {squares[c].x + off.x * off.x, squares[c].y + off.y * off.y};
            }
            values[c] = {values[c].x + value.pair(c).x, values[c].y + value.pair(c).y};
        }
    }

    // Every lane has the sums of all tokens then; the first of each channels writes.
    float const share = 1.0f / max(tokens, 1);
    float const largest = largest_of(Pair{});
    Pair summary[3][4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        auto statistics = [&](float sum, float squares, float origin, float& mean, float& variance) {
            float const off = join_tokens(sum) * share;
            mean = origin + off;
            variance = join_tokens(squares) * share - off * off;
            // NaN stays.
            variance = variance < 0.0f ? 0.0f : variance > largest ? largest : variance;
        };
        float2 mean;
        float2 variance;
        statistics(sum[c].x, squares[c].x, origin.pair(c).x, mean.x, variance.x);
        statistics(sum[c].y, squares[c].y, origin.pair(c).y, mean.y, variance.y);
        summary[0][c] = narrow<Pair>(mean);
        summary[1][c] = narrow<Pair>(variance);
        summary[2][c] = narrow<Pair>({join_tokens(values[c].x) * share, join_tokens(values[c].y) * share});
    }
    int64_t const part = static_cast<int64_t>(params.batch) * blocks * params.kv_heads * params.head_dim;
    auto* const out = static_cast<uint16_t*>(params.summaries) + row * params.head_dim + channel;
    if (here && lane < kSliceLanes) {
#pragma unroll
        for (int i = 0; i < 3; ++i) { *reinterpret_cast<uint4*>(out + i * part) = reinterpret_cast<uint4 const&>(summary[i]); }
    }
}

}  // namespace

char const* summarize_blocks(SummarizeBlocksParams const& params, cudaStream_t stream) {
    int64_t const rows = static_cast<int64_t>(params.batch) * ceil_div(params.tokens_k, kBlockK) * params.kv_heads;
    int64_t const warps = rows * ceil_div(params.head_dim, kSlice);
    auto const grid = static_cast<unsigned>((warps + kWarps - 1) / kWarps);
    if (params.dtype == DType::kBFloat16) {
        summarize_kernel<__nv_bfloat162><<<grid, kWarps * kWarp, 0, stream>>>(params);
    } else {
        summarize_kernel<__half2><<<grid, kWarps * kWarp, 0, stream>>>(params);
    }
    cudaError_t const error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace lite_attention::sm90
