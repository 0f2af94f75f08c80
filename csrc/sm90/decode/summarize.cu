// SPDX-License-Identifier: MIT
// Writes the summaries of the blocks that a step has completed: as `lite_attention/reference.py`, `summarize`.
#include <cfloat>

#include "../common/warp.h"
#include "params.h"

namespace lite_attention::sm90 {
namespace {

constexpr int kWarps = 8;
constexpr int kMaxPairs = 256 / (2 * kWarp);  // pairs of channels of a lane

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
    float2 mean[kMaxPairs] = {};
    float2 deviation[kMaxPairs] = {};
    float largest_mean = 0.0f;
    float largest_deviation = 0.0f;
#pragma unroll
    for (int pair = 0; pair < kMaxPairs; ++pair) {
        int const channel = 2 * (pair * kWarp + lane);
        if (channel >= params.head_dim) { continue; }
        float2 key[kDecodeBlock];
#pragma unroll
        for (int i = 0; i < kDecodeBlock; ++i) {
            key[i] = widen(*reinterpret_cast<Pair const*>(keys + i * params.key.token_stride + channel));
        }
        float2 sum{};
#pragma unroll
        for (int i = 0; i < kDecodeBlock; ++i) {
            sum.x += key[i].x;
            sum.y += key[i].y;
        }
        mean[pair] = {sum.x / kDecodeBlock, sum.y / kDecodeBlock};
        float2 squares{};
#pragma unroll
        for (int i = 0; i < kDecodeBlock; ++i) {
            float2 const off{key[i].x - mean[pair].x, key[i].y - mean[pair].y};
            squares.x += off.x * off.x;
            squares.y += off.y * off.y;
        }
        deviation[pair] = {sqrtf(squares.x / kDecodeBlock), sqrtf(squares.y / kDecodeBlock)};
        largest_mean = fmaxf(largest_mean, fmaxf(fabsf(mean[pair].x), fabsf(mean[pair].y)));
        largest_deviation = fmaxf(largest_deviation, fmaxf(deviation[pair].x, deviation[pair].y));
    }
    float2 const scales{join_lanes(largest_mean, fmaxf) / 127.0f, join_lanes(largest_deviation, fmaxf) / 255.0f};
    float2 const steps{fmaxf(scales.x, FLT_MIN), fmaxf(scales.y, FLT_MIN)};

    uint8_t* const summary = params.summaries.data + page * params.summaries.page_stride +
                             kv_head * params.summaries.head_stride + last / kDecodeBlock * params.summaries.block_stride;
#pragma unroll
    for (int pair = 0; pair < kMaxPairs; ++pair) {
        int const channel = 2 * (pair * kWarp + lane);
        if (channel >= params.head_dim) { continue; }
        auto to_signed = [&](float value) { return static_cast<signed char>(rintf(value / steps.x)); };
        auto to_unsigned = [&](float value) { return static_cast<unsigned char>(rintf(value / steps.y)); };
        *reinterpret_cast<char2*>(summary + channel) = {to_signed(mean[pair].x), to_signed(mean[pair].y)};
        *reinterpret_cast<uchar2*>(summary + params.head_dim + channel) = {
            to_unsigned(deviation[pair].x), to_unsigned(deviation[pair].y)};
    }
    if (lane == 0) { *reinterpret_cast<float2*>(summary + 2 * params.head_dim) = scales; }
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
