// SPDX-License-Identifier: MIT
// What stands between the host and the Hopper kernels of `lite_attention::decode` and `summarize`: plain structs, no PyTorch.
// The meaning of every argument is that of `lite_attention/reference.py`.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/dtype.h"

namespace lite_attention::sm90 {

constexpr int kDecodeBlock = 16;     // keys that are scored and skipped together
constexpr int kWordBlocks = 32;      // blocks of a word of the mask
constexpr int kTileBlocks = 16;      // blocks that are estimated together
constexpr int kSegmentBlocks = 128;  // blocks of a part that a thread block attends to, at most
constexpr int kChunkBlocks = 2048;   // blocks of a row's key head that are listed together
constexpr int kChunkParts = kChunkBlocks / kSegmentBlocks;  // where everything is visited
constexpr int kChunkSlots = kChunkParts + kChunkParts / 2;   // places for parts of a chunk: see parts_of
constexpr int kMaxGroup = 16;        // query heads of a key head
constexpr int kMaxRows = 1024;

// A paged tensor (pages, page_size, kv_heads, head_dim) with a contiguous last dimension; strides in elements.
struct PagedView {
    void* data;
    int64_t page_stride;
    int64_t token_stride;
    int64_t head_stride;
};

// Of a block and key head.
constexpr int summary_bytes(int head_dim) { return 2 * head_dim + 16; }

// The summaries of a paged cache, (pages, kv_heads, blocks of a page, summary_bytes); 16-byte aligned, strides in bytes,
// multiples of 16.
struct SummaryView {
    uint8_t* data;
    int64_t page_stride;
    int64_t head_stride;
    int64_t block_stride;
};

struct DecodeParams {
    void const* query;  // (rows, heads, head_dim), 16-byte aligned, strides multiples of 8 elements
    int64_t query_row_stride;
    int64_t query_head_stride;
    PagedView key;  // 16-byte aligned, strides multiples of 8 elements (the copy engine's rule)
    PagedView value;
    SummaryView summaries;
    int32_t const* block_table;  // (rows, pages of a row)
    int64_t block_table_stride;
    int32_t const* seq_lens;  // the four of them (rows,)
    int32_t const* slots;
    float const* thresholds;
    bool const* visit_all;
    int32_t* mask;  // (slots, kv_heads, words), words contiguous
    int64_t mask_slot_stride;
    int64_t mask_head_stride;

    void* out;  // (rows, heads, head_dim)
    int64_t out_row_stride;
    int64_t out_head_stride;
    float* lse;        // (rows, heads) contiguous, natural log
    int32_t* visited;  // (rows,), added to

    void* workspace;  // decode_workspace_bytes(), 16-byte aligned

    int pages;        // of the cache
    int rows;         // 1 to kMaxRows
    int row_pages;    // entries of a row of the block table
    int page_size;    // a multiple of kDecodeBlock
    int heads;
    int kv_heads;
    int head_dim;     // a multiple of 16 up to 256
    float scale;
    DType dtype;
};

struct SummarizeParams {
    PagedView key;
    SummaryView summaries;
    int64_t const* slot_mapping;  // (tokens,)
    int64_t tokens;
    int page_size;
    int kv_heads;
    int head_dim;  // a multiple of 16 up to 256
    DType dtype;
};

// Bytes that a call needs to work in. `max_tokens`: what a row of the block table has room for.
int64_t decode_workspace_bytes(int rows, int heads, int kv_heads, int head_dim, int64_t max_tokens);

// Launch on `stream`, without allocation or synchronisation. Null on success, else what went wrong (static text). Expect
// checked arguments: shapes that fit, at least one row or token.
char const* decode(DecodeParams const& params, cudaStream_t stream);
char const* summarize(SummarizeParams const& params, cudaStream_t stream);

}  // namespace lite_attention::sm90
