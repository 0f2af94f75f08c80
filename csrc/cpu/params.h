// What the Python side passes to the CPU kernels: plain data, no torch.
// Strides count elements; the mirror of each struct is in lite_attention/native/__init__.py.
#pragma once
#include <cstdint>

namespace lite_attention {

constexpr int kBlock = 16;  // keys of the paged cache that are scored and skipped together

enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct KeyCache {
    const void* data;  // (pages, page_size, kv_heads, head_dim)
    int64_t page, token, head, dim;
};

struct Summaries {
    uint8_t* data;  // (pages, kv_heads, page_size / kBlock, 2 * head_dim + 16), see lite_attention/reference.py
    int64_t page, head, block;
};

struct DecodeParams {
    const void* query;  // (rows, heads, head_dim)
    int64_t query_row, query_head;
    KeyCache key;
    const void* value;  // as key, head_dim contiguous
    int64_t value_page, value_token, value_head;
    Summaries summaries;
    const int32_t* block_table;  // (rows, pages)
    int64_t block_table_row;
    const int32_t* seq_lens;    // (rows,)
    const int32_t* slots;       // (rows,)
    const float* thresholds;    // (rows,) log2 share; -inf is dense
    const uint8_t* visit_all;   // (rows,)
    int32_t* mask;              // (slots, kv_heads, words), updated in place
    int64_t mask_slot, mask_head;
    void* out;         // (rows, heads, head_dim), contiguous
    float* lse;        // (rows, heads), natural log
    int32_t* visited;  // (rows,) blocks visited, summed over KV heads
    int32_t rows, heads, kv_heads, head_dim, page_size, dtype;
    float scale;
};

struct SummarizeParams {
    KeyCache key;
    Summaries summaries;
    const int64_t* slot_mapping;  // (tokens,) cache position of each token written, -1 is padding
    int64_t tokens;
    int32_t kv_heads, head_dim, page_size, dtype;
};

}  // namespace lite_attention
