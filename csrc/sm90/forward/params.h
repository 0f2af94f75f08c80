// SPDX-License-Identifier: MIT
// What stands between the host and the Hopper kernels of `lite_attention::forward`: plain structs, no PyTorch.
// The meaning of every argument is that of `lite_attention/reference.py`, `forward`.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/dtype.h"

namespace lite_attention::sm90 {

// A tensor (batch, tokens, heads, head_dim) with a contiguous last dimension; strides in elements.
struct TensorView {
    void* data;
    int64_t batch_stride;
    int64_t token_stride;
    int64_t head_stride;
};

enum class Rule : int { kRunningMax = 0, kMass = 1, kMassSummaries = 2 };

struct ForwardParams {
    // 16-byte aligned, strides multiples of 8 elements (the copy engine's rule).
    TensorView query;
    TensorView key;
    TensorView value;
    TensorView out;

    float* lse;        // (batch, heads, tokens_q) contiguous, natural log
    int32_t* schedule;  // words for the launch: one, and with a mask two for each row of it

    // The skip state; `mask` null: dense, and the others are not read.
    int32_t* mask;  // (batch, heads, tiles, words), words contiguous
    int64_t mask_batch_stride;
    int64_t mask_head_stride;
    int64_t mask_tile_stride;
    float* lse_state;  // (batch, heads, tokens_q), tokens contiguous; not of the rule `running_max`
    int64_t lse_state_batch_stride;
    int64_t lse_state_head_stride;
    float const* thresholds;    // (batch,)
    int32_t const* must_visit;  // (words,) or null
    int32_t const* must_skip;   // (words,) or null
    int64_t* visited;           // one number, written: pairs of a tile and a block that are visited; or null

    // Rule `mass_summaries`: means and variances of the keys of blocks and means of their values, (3, batch, blocks, kv_heads,
    // head_dim) contiguous, and room for notes, as large as the mask and contiguous. Both are written.
    void* summaries;
    int32_t* skipped;

    int batch;
    int tokens_q;
    int tokens_k;
    int heads;
    int kv_heads;
    int head_dim;  // a multiple of 8 up to 256

    float scale;
    bool causal;
    Rule rule;
    DType dtype;
};

struct SummarizeBlocksParams {
    TensorView key;  // as in ForwardParams
    TensorView value;
    int32_t const* must_skip;  // (words,) or null: blocks whose summaries are zeros, and that are not read
    void* summaries;  // as in ForwardParams; written
    int batch;
    int tokens_k;
    int kv_heads;
    int head_dim;
    DType dtype;
};

// Both launch on `stream`, without allocation or synchronisation. Null on success, else what went wrong (static text).
// Expects checked arguments: shapes that fit, at least one batch row, query and head; tokens_k may be 0.
char const* forward(ForwardParams const& params, cudaStream_t stream);
char const* summarize_blocks(SummarizeBlocksParams const& params, cudaStream_t stream);

}  // namespace lite_attention::sm90
