// SPDX-License-Identifier: MIT
// Summaries of blocks of keys and values, as `lite_attention/reference.py`, `summarize_blocks`: everything is read once.
#include <algorithm>

#include "../common/device.h"
#include "../common/math.h"
#include "../common/warp.h"
#include "config.h"
#include "params.h"

namespace lite_attention::sm90 {
namespace {

// One multiprocessor of kShare reads about as fast as memory gives, and the attention kernel, whose thread blocks need a
// multiprocessor whole, begins on the others.
constexpr int kShare = 3;
constexpr int kWarps = 16;
constexpr int kChannels = 8;                     // of a lane: 16 bytes
constexpr int kSliceLanes = 8;                   // that read neighbouring channels of a token: 128 bytes
constexpr int kSlice = kSliceLanes * kChannels;  // channels of a warp
constexpr int kTokens = kWarp / kSliceLanes;     // that a warp reads at a time
constexpr int kReads = 8;                        // of keys and of values that a warp waits for at a time
static_assert(kBlockK % (kReads * kTokens) == 0);

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

// What the first lanes, which hold the first of a warp's tokens, have of the same channels.
template <class Pair>
__device__ __forceinline__ Channels<Pair> from_first_token(Channels<Pair> const& channels) {
    int const lane = threadIdx.x % kSliceLanes;
    auto first = [&](uint32_t word) { return __shfl_sync(~0u, word, lane); };
    uint4 const words = channels.words;
    return {{first(words.x), first(words.y), first(words.z), first(words.w)}};
}

// Warps take slices of channels of a block and key head in turn. The kernel behind may begin at once.
template <class Pair>
__global__ void __launch_bounds__(kWarps * kWarp, 1) summarize_kernel(SummarizeBlocksParams const params) {
    cudaTriggerProgrammaticLaunchCompletion();
    int const lane = threadIdx.x % kWarp;
    int const slices = ceil_div(params.head_dim, kSlice);
    int const blocks = ceil_div(params.tokens_k, kBlockK);
    int64_t const rows = static_cast<int64_t>(params.batch) * blocks * params.kv_heads;
    float const largest = largest_of(Pair{});
    int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
    for (; index < rows * slices; index += static_cast<int64_t>(gridDim.x) * kWarps) {
        int const slice = static_cast<int>(index % slices);
        int64_t const row = index / slices;  // (batch, block, key head)
        int const head = static_cast<int>(row % params.kv_heads);
        int const block = static_cast<int>(row / params.kv_heads % blocks);
        int const batch = static_cast<int>(row / params.kv_heads / blocks);
        int const channel = slice * kSlice + lane % kSliceLanes * kChannels;
        bool const here = channel < params.head_dim;
        bool const skipped = params.must_skip != nullptr && (params.must_skip[block / 32] >> block % 32 & 1);
        int const tokens = skipped ? 0 : min(kBlockK, params.tokens_k - block * kBlockK);

        auto first_of = [&](TensorView const& view) {
            return static_cast<uint16_t const*>(view.data) + batch * view.batch_stride + head * view.head_stride + channel +
                   (static_cast<int64_t>(block) * kBlockK + lane / kSliceLanes) * view.token_stride;
        };
        uint16_t const* keys = first_of(params.key);
        uint16_t const* values = first_of(params.value);
        Channels<Pair> origin;
        float2 sum[4]{};
        float2 squares[4]{};
        float2 value_sum[4]{};
#pragma unroll 1
        for (int first = 0; first < tokens; first += kReads * kTokens) {
            int const token = first + lane / kSliceLanes;
            // All of these are under way at a time.
            Channels<Pair> key[kReads];
            Channels<Pair> value[kReads];
#pragma unroll
            for (int i = 0; i < kReads; ++i) {
                if (here && token + i * kTokens < tokens) {
                    key[i].words = __ldg(reinterpret_cast<uint4 const*>(keys));
                    value[i].words = __ldg(reinterpret_cast<uint4 const*>(values));
                }
                keys += kTokens * params.key.token_stride;
                values += kTokens * params.value.token_stride;
            }
            // Squares of distances from the block's first key: next to those, what is lost by their sum's own distance is little.
            if (first == 0) { origin = from_first_token(key[0]); }
#pragma unroll
            for (int i = 0; i < kReads; ++i) {
                // Past the end: no distance.
                if (token + i * kTokens >= tokens) { key[i] = origin; }
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    float2 const off = {key[i].pair(c).x - origin.pair(c).x, key[i].pair(c).y - origin.pair(c).y};
                    sum[c] = {sum[c].x + off.x, sum[c].y + off.y};
                    squares[c] = {squares[c].x + off.x * off.x, squares[c].y + off.y * off.y};
                    value_sum[c] = {value_sum[c].x + value[i].pair(c).x, value_sum[c].y + value[i].pair(c).y};
                }
            }
        }

        // Every lane has the sums of all tokens then; the first of each channels writes.
        float const share = 1.0f / max(tokens, 1);
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
            summary[2][c] = narrow<Pair>({join_tokens(value_sum[c].x) * share, join_tokens(value_sum[c].y) * share});
        }
        int64_t const part = rows * params.head_dim;
        auto* const out = static_cast<uint16_t*>(params.summaries) + row * params.head_dim + channel;
        if (here && lane < kSliceLanes) {
#pragma unroll
            for (int i = 0; i < 3; ++i) {
                *reinterpret_cast<uint4*>(out + i * part) = reinterpret_cast<uint4 const&>(summary[i]);
            }
        }
    }
}

}  // namespace

char const* summarize_blocks(SummarizeBlocksParams const& params, cudaStream_t stream) {
    int64_t const rows = static_cast<int64_t>(params.batch) * ceil_div(params.tokens_k, kBlockK) * params.kv_heads;
    int64_t const warps = rows * ceil_div(params.head_dim, kSlice);
    if (warps == 0) { return nullptr; }
    auto const grid = static_cast<unsigned>(std::min<int64_t>((warps + kWarps - 1) / kWarps, processors() / kShare));
    auto const kernel =
        params.dtype == DType::kBFloat16 ? summarize_kernel<__nv_bfloat162> : summarize_kernel<__half2>;
    kernel<<<grid, kWarps * kWarp, 0, stream>>>(params);
    cudaError_t const error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace lite_attention::sm90
