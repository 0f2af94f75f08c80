// SPDX-License-Identifier: MIT
// The first kernel of a decode step: what the blocks of sequences that skip weigh, by their summaries. A thread block takes a
// segment at a time, each of its warps a word of blocks. The second kernel compares them with what all segments have together.
#pragma once

#include "score.h"
#include "work.h"

namespace lite_attention::sm90 {

// Of `spread`; see lite_attention/reference.py.
constexpr float kExpectedBend = 3.1f;
constexpr float kGenerousBend = 8.0f;

template <class Config>
struct EstimateStorage {
    alignas(16) typename Config::Element query[Config::kHeads * Config::kQueryRow];
    ScoringQuery<Config> scoring[Config::kHeadTiles];
    // Of each warp's blocks: their largest expected mass, and the sum in units of it.
    float largest[Config::kEstimators][Config::kHeads];
    float sum[Config::kEstimators][Config::kHeads];
    int first_unit[1];  // of each row, and the number of units at the end: rows + 1 of them
};

// Notes what the blocks of a word may weigh, and what all of them together probably do. Runs in a warp.
template <class Config>
CUTLASS_DEVICE void estimate_word(
    KernelParams const& params, EstimateStorage<Config>& shared, Place const& place, int word, int warp) {
    using Element = typename Config::Element;
    DecodeParams const& call = params.call;
    int const lane = threadIdx.x % kWarp;
    int const group = params.group;
    int const blocks_of_page = call.page_size / kDecodeBlock;
    int const first = word * kWordBlocks;
    float* const masses = params.workspace.masses + place.pair * params.workspace.words * kWordBlocks * group;
    auto page_of = [&](int block) { return call.block_table[place.row * call.block_table_stride + block / blocks_of_page]; };

    // A block that does not exist has the summary of another.
    int const of_lane = min(first + lane, place.blocks - 1);
    uint8_t const* const summary = call.summaries.data + page_of(of_lane) * call.summaries.page_stride +
                                   place.kv_head * call.summaries.head_stride +
                                   of_lane % blocks_of_page * call.summaries.block_stride;
    float largest[Config::kHeadTiles][2];
    float sum[Config::kHeadTiles][2] = {};
    CUTLASS_PRAGMA_UNROLL
    for (int tile = 0; tile < Config::kHeadTiles; ++tile) { largest[tile][0] = largest[tile][1] = -INFINITY; }
    CUTLASS_PRAGMA_UNROLL
    for (int half = 0; half < 2; ++half) {
        int const low = first + half * 16 + lane / 4;  // this thread's blocks: this one and 8 further
        Summaries<Config> summaries;
        summaries.load(summary, half * 16, call.head_dim);
        CUTLASS_PRAGMA_UNROLL
        for (int tile = 0; tile < Config::kHeadTiles; ++tile) {
            float mean_mass[4];
            float variance[4];
            summaries.moments(shared.scoring[tile], params.scale_log2, mean_mass, variance);
            int const head = tile * kHeadTile + lane % 4 * 2;
            float expected[4];
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < 4; ++i) {
                int const block = low + i / 2 * 8;
                expected[i] = block < place.blocks ? mean_mass[i] + spread(variance[i], kExpectedBend) : -INFINITY;
                if (block < place.blocks && head + i % 2 < group) {
                    masses[static_cast<int64_t>(block) * group + head + i % 2] = mean_mass[i] + spread(variance[i], kGenerousBend);
                }
            }
            // What is visited in any case is weighed exactly: the first block, and the newest two.
            for (int i = 0; i < 3; ++i) {
                int const block = i == 0 ? 0 : place.blocks - i;
                if (block / 16 != first / 16 + half || (i > 0 && block <= 0)) { continue; }
                auto const* const keys = static_cast<Element const*>(call.key.data) + page_of(block) * call.key.page_stride +
                                         block % blocks_of_page * kDecodeBlock * call.key.token_stride +
                                         place.kv_head * call.key.head_stride;
                float2 const exact = exact_mass<Config>(
                    keys, call.key.token_stride, min(kDecodeBlock, place.length - block * kDecodeBlock),
                    shared.query + tile * kHeadTile * Config::kQueryRow, call.head_dim, params.scale_log2);
                CUTLASS_PRAGMA_UNROLL
                for (int j = 0; j < 2; ++j) {
                    if (block == low + j * 8) {
                        expected[2 * j] = exact.x;
                        expected[2 * j + 1] = exact.y;
                    }
                }
            }
            CUTLASS_PRAGMA_UNROLL
            for (int h = 0; h < 2; ++h) {
                float const before = largest[tile][h];
                float const now = fmaxf(before, join_rows(fmaxf(expected[h], expected[h + 2]), fmaxf));
                if (now != -INFINITY) {
                    sum[tile][h] = sum[tile][h] * exp2f(before - now) + exp2f(expected[h] - now) + exp2f(expected[h + 2] - now);
                    largest[tile][h] = now;
                }
            }
        }
    }
    CUTLASS_PRAGMA_UNROLL
    for (int tile = 0; tile < Config::kHeadTiles; ++tile) {
        CUTLASS_PRAGMA_UNROLL
        for (int h = 0; h < 2; ++h) {
            float const of_word = join_rows(sum[tile][h], add);
            if (lane < 4) {
                shared.largest[warp][tile * kHeadTile + lane * 2 + h] = largest[tile][h];
                shared.sum[warp][tile * kHeadTile + lane * 2 + h] = of_word;
            }
        }
    }
}

template <class Config>
__global__ void __launch_bounds__(Config::kEstimators * kWarp) estimate_kernel(__grid_constant__ KernelParams const params) {
    extern __shared__ __align__(1024) uint8_t memory[];
    auto& shared = *reinterpret_cast<EstimateStorage<Config>*>(memory);
    // The second kernel waits where it needs what this one writes; sequences that visit everything need nothing.
    cudaTriggerProgrammaticLaunchCompletion();
    number_units(params.call, shared.first_unit);
    int const units = shared.first_unit[params.call.rows];
    int const thread = threadIdx.x;
    int const warp = thread / kWarp;
    int const group = params.group;
    for (int index = blockIdx.x; index < units; index += gridDim.x) {
        Place const place(params.call, params.workspace, shared.first_unit, index);
        if (place.everything) { continue; }
        copy_queries<Config>(params, place, shared.query, thread, Config::kEstimators * kWarp);
        __syncthreads();
        if (warp < Config::kHeadTiles) { shared.scoring[warp].fill(shared.query + warp * kHeadTile * Config::kQueryRow); }
        __syncthreads();
        int const word = place.segment * kSegmentWords + warp;
        int const words = min(kSegmentWords, ceil_div(place.blocks, kWordBlocks) - place.segment * kSegmentWords);
        if (warp < words) { estimate_word(params, shared, place, word, warp); }
        __syncthreads();
        if (thread < group) {
            float largest = -INFINITY;
            for (int w = 0; w < words; ++w) { largest = fmaxf(largest, shared.largest[w][thread]); }
            float sum = 0.0f;
            for (int w = 0; w < words; ++w) { sum += shared.sum[w][thread] * exp2f(shared.largest[w][thread] - largest); }
            params.workspace.expected[place.part * group + thread] = largest + log2f(sum);
        }
    }
}

}  // namespace lite_attention::sm90
