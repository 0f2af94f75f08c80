// SPDX-License-Identifier: MIT
// Writes the summaries of the blocks that a step has completed: as `lite_attention/reference.py`, `summarize`.
#include <cfloat>

#include "../common/warp.h"
#include "params.h"

namespace lite_attention::sm90 {
namespace {

constexpr int kWarps = 8;
constexpr int kMaxPairs = 256 / (2 * kWarp);  // pairs of channels of a lane

template <class Number>
__device__ __forceinline__ Number add(Number a, Number b) {
    return a + b;
}

// What ends up in a summary is rounded at each step and summed up in the order of the keys, as the reference does it: compiled
// with --use_fast_math, operators would divide by approximation and join products and sums.
__device__ __forceinline__ float2 plus(float2 a, float2 b) { return {__fadd_rn(a.x, b.x), __fadd_rn(a.y, b.y)}; }
__device__ __forceinline__ float2 minus(float2 a, float2 b) { return {__fsub_rn(a.x, b.x), __fsub_rn(a.y, b.y)}; }
__device__ __forceinline__ float2 square(float2 a) { return {__fmul_rn(a.x, a.x), __fmul_rn(a.y, a.y)}; }
__device__ __forceinline__ float2 over(float2 a, float b) { return {__fdiv_rn(a.x, b), __fdiv_rn(a.y, b)}; }

// How one of the three parts of a summary is written down: a number n for each channel.
struct Coding {
    int largest;   // of the magnitudes of n
    bool squared;  // n |n| counts, not n
    int zero;      // added to n
    int shift;     // of the lowest bit in the channel's word

    constexpr int level(int n) const { return squared ? n * n : n; }
};

// Two channels of the keys of a block.
template <class Pair>
__device__ __forceinline__ void load_channels(float2 (&key)[kDecodeBlock], uint16_t const* first, int64_t token_stride) {
#pragma unroll
    for (int i = 0; i < kDecodeBlock; ++i) { key[i] = widen(*reinterpret_cast<Pair const*>(first + i * token_stride)); }
}

// Mean of the keys but the one `without`; -1: of all.
__device__ __forceinline__ float2 mean_of(float2 const (&key)[kDecodeBlock], int without) {
    float2 sum{};
#pragma unroll
    for (int i = 0; i < kDecodeBlock; ++i) { sum = plus(sum, i == without ? float2{} : key[i]); }
    return over(sum, without < 0 ? kDecodeBlock : kDecodeBlock - 1);
}

// A warp for each token and key head; those whose token completes no block leave at once.
template <class Pair>
__global__ void __launch_bounds__(kWarps * kWarp) summarize_kernel(SummarizeParams const params) {
    int const lane = threadIdx.x % kWarp;
    int64_t const index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
    int64_t const token = index / params.kv_heads;
    int const kv_head = static_cast<int>(index % params.kv_heads);
    if (token >= params.tokens) { return; }
    int64_t const slot = params.slot_mapping[token];
    if (slot < 0 || slot % kDecodeBlock != kDecodeBlock - 1) { return; }
    int64_t const page = slot / params.page_size;
    int const last = static_cast<int>(slot % params.page_size);

    auto const* const keys = static_cast<uint16_t const*>(params.key.data) + page * params.key.page_stride +
                             (last - (kDecodeBlock - 1)) * params.key.token_stride + kv_head * params.key.head_stride;
    // The key farthest from the mean of all is the outlier.
    float distance[kDecodeBlock] = {};
#pragma unroll
    for (int pair = 0; pair < kMaxPairs; ++pair) {
        int const channel = 2 * (pair * kWarp + lane);
        if (channel >= params.head_dim) { continue; }
        float2 key[kDecodeBlock];
        load_channels<Pair>(key, keys + channel, params.key.token_stride);
        float2 const mean = mean_of(key, -1);
#pragma unroll
        for (int i = 0; i < kDecodeBlock; ++i) {
            float2 const off = square(minus(key[i], mean));
            distance[i] += off.x + off.y;
        }
    }
    int outlier = 0;
    float farthest = -1.0f;
#pragma unroll
    for (int i = 0; i < kDecodeBlock; ++i) {
        float const of_key = join_lanes(distance[i], add<float>);
        if (of_key > farthest) {
            outlier = i;
            farthest = of_key;
        }
    }

    // Outlier, and mean and deviation of the others.
    float2 part[3][kMaxPairs] = {};
    float largest[3] = {};
#pragma unroll
    for (int pair = 0; pair < kMaxPairs; ++pair) {
        int const channel = 2 * (pair * kWarp + lane);
        if (channel >= params.head_dim) { continue; }
        float2 key[kDecodeBlock];
        load_channels<Pair>(key, keys + channel, params.key.token_stride);
        float2 const mean = mean_of(key, outlier);
        float2 squares{};
#pragma unroll
        for (int i = 0; i < kDecodeBlock; ++i) {
            if (i == outlier) {
                part[0][pair] = key[i];
            } else {
                squares = plus(squares, square(minus(key[i], mean)));
            }
        }
        part[1][pair] = mean;
        float2 const variance = over(squares, kDecodeBlock - 1);
        part[2][pair] = {__fsqrt_rn(variance.x), __fsqrt_rn(variance.y)};
#pragma unroll
        for (int i = 0; i < 3; ++i) {
            largest[i] = fmaxf(largest[i], fmaxf(fabsf(part[i][pair].x), fabsf(part[i][pair].y)));
        }
    }

    uint8_t* const summary = params.summaries.data + page * params.summaries.page_stride +
                             kv_head * params.summaries.head_stride + last / kDecodeBlock * params.summaries.block_stride;
    constexpr Coding codings[] = {{15, true, 16, 11}, {63, true, 64, 0}, {15, false, 0, 7}};  // outlier, mean, deviation
    uint32_t words[kMaxPairs] = {};
    float scale[3];
#pragma unroll
    for (int i = 0; i < 3; ++i) {
        Coding const coding = codings[i];
        float const step = fmaxf(__fdiv_rn(join_lanes(largest[i], fmaxf), coding.level(coding.largest)), FLT_MIN);
        // Such that a query along the part is scored right; in double, so that the order does not matter.
        double squares = 0.0;
        double products = 0.0;
#pragma unroll
        for (int pair = 0; pair < kMaxPairs; ++pair) {
            if (2 * pair * kWarp >= params.head_dim) { break; }
            float const values[2] = {part[i][pair].x, part[i][pair].y};
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                float const steps = __fdiv_rn(fabsf(values[k]), step);
                // Between two squares lies n^2 + n + 1/2 = (n + 1/2)^2 + 1/4.
                float const root = __fsqrt_rn(fmaxf(__fsub_rn(steps, 0.25f), 0.0f));
                int const n = __float2int_rn(coding.squared ? root : steps);
                double const value = fabsf(values[k]);
                squares += value * value;
                products += value * coding.level(n);
                words[pair] |= ((values[k] < 0.0f ? -n : n) + coding.zero) << (coding.shift + 16 * k);
            }
        }
        squares = join_lanes(squares, add<double>);
        products = join_lanes(products, add<double>);
        scale[i] = products > 0.0 ? static_cast<float>(squares / products) : 0.0f;
    }
#pragma unroll
    for (int pair = 0; pair < kMaxPairs; ++pair) {
        int const channel = 2 * (pair * kWarp + lane);
        if (channel < params.head_dim) { reinterpret_cast<uint32_t*>(summary)[channel / 2] = words[pair]; }
    }
    if (lane < 3) {
        reinterpret_cast<float*>(summary + 2 * params.head_dim)[lane] = lane == 0 ? scale[0] : lane == 1 ? scale[1] : scale[2];
    }
}

}  // namespace

char const* summarize(SummarizeParams const& params, cudaStream_t stream) {
    int64_t const warps = params.tokens * params.kv_heads;
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
