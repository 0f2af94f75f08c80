// SPDX-License-Identifier: MIT
// The CUDA kernels as PyTorch operators. Only PyTorch's stable ABI is used, so one build serves every PyTorch from
// 2.11 on and every Python. `lite_attention/forward_cuda.py` calls what is registered here, with checked arguments.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "sm90/decode/params.h"
#include "sm90/forward/config.h"
#include "sm90/forward/params.h"

// PyTorch's header declares it only where PyTorch itself was built for CUDA; to compile, a CPU build is enough.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace lite_attention {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr char const* kForwardSchema =
    "forward_sm90(Tensor query, Tensor key, Tensor value, Tensor(a!) out, Tensor(b!) lse, Tensor(c!) schedule, "
    "Tensor(d!)? mask, Tensor(e!)? lse_state, Tensor? thresholds, Tensor? must_visit, Tensor? must_skip, "
    "Tensor(f!)? visited, Tensor(g!)? summaries, Tensor(h!)? skipped, float scale, bool causal, int rule) -> ()";
constexpr char const* kSummarizeBlocksSchema =
    "summarize_blocks_sm90(Tensor key, Tensor value, Tensor? must_skip, Tensor(a!) summaries) -> ()";
constexpr char const* kSummarizeSchema =
    "summarize_sm90(Tensor key_cache, Tensor slot_mapping, Tensor(a!) summaries) -> ()";
constexpr char const* kDecodeSchema =
    "decode_sm90(Tensor query, Tensor key_cache, Tensor value_cache, Tensor summaries, Tensor block_table, Tensor seq_lens, "
    "Tensor slots, Tensor thresholds, Tensor visit_all, Tensor(a!) mask, Tensor(b!) out, Tensor(c!) lse, "
    "Tensor(d!) visited, Tensor(e!) workspace, float scale) -> ()";

sm90::TensorView view(Tensor const& tensor) {
    return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

sm90::PagedView paged_view(Tensor const& cache) {
    return {cache.data_ptr(), cache.stride(0), cache.stride(1), cache.stride(2)};
}

template <class T>
T* data(Tensor const& tensor) {
    return static_cast<T*>(tensor.data_ptr());
}

template <class T>
T* data(std::optional<Tensor> const& tensor) {
    return tensor ? data<T>(*tensor) : nullptr;
}

sm90::DType dtype(Tensor const& query) {
    ScalarType const type = query.scalar_type();
    STD_TORCH_CHECK(
        type == ScalarType::BFloat16 || type == ScalarType::Half, "query: expected bfloat16 or float16, got type ",
        static_cast<int>(type));
    return type == ScalarType::BFloat16 ? sm90::DType::kBFloat16 : sm90::DType::kFloat16;
}

cudaStream_t current_stream(int32_t device) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    return static_cast<cudaStream_t>(stream);
}

// Calls `kernels` with the current stream of a tensor's device. RuntimeError if it says that the launch failed.
template <class Kernels>
void launch(Tensor const& tensor, Kernels kernels) {
    int32_t const device = tensor.get_device_index();
    torch::stable::accelerator::DeviceGuard const guard(device);
    char const* const error = kernels(current_stream(device));
    STD_TORCH_CHECK(error == nullptr, error);
}

// The layouts of `sm90::ForwardParams`; results and state are written in place, `rule` is a number of `sm90::Rule`. RuntimeError
// if the launch fails.
void forward_sm90(
    Tensor const& query,
    Tensor const& key,
    Tensor const& value,
    Tensor const& out,
    Tensor const& lse,
    Tensor const& schedule,
    std::optional<Tensor> const& mask,
    std::optional<Tensor> const& lse_state,
    std::optional<Tensor> const& thresholds,
    std::optional<Tensor> const& must_visit,
    std::optional<Tensor> const& must_skip,
    std::optional<Tensor> const& visited,
    std::optional<Tensor> const& summaries,
    std::optional<Tensor> const& skipped,
    double scale,
    bool causal,
    int64_t rule) {
    sm90::ForwardParams params{};
    params.query = view(query);
    params.key = view(key);
    params.value = view(value);
    params.out = view(out);
    params.lse = data<float>(lse);
    params.schedule = data<int32_t>(schedule);
    if (mask) {
        params.mask = data<int32_t>(mask);
        params.mask_batch_stride = mask->stride(0);
        params.mask_head_stride = mask->stride(1);
        params.mask_tile_stride = mask->stride(2);
    }
    if (lse_state) {
        params.lse_state = data<float>(lse_state);
        params.lse_state_batch_stride = lse_state->stride(0);
        params.lse_state_head_stride = lse_state->stride(1);
    }
    params.thresholds = data<float>(thresholds);
    params.must_visit = data<int32_t>(must_visit);
    params.must_skip = data<int32_t>(must_skip);
    params.visited = data<int64_t>(visited);
    params.summaries = summaries ? summaries->data_ptr() : nullptr;
    params.skipped = data<int32_t>(skipped);
    params.batch = static_cast<int>(query.size(0));
    params.tokens_q = static_cast<int>(query.size(1));
    params.tokens_k = static_cast<int>(key.size(1));
    params.heads = static_cast<int>(query.size(2));
    params.kv_heads = static_cast<int>(key.size(2));
    params.head_dim = static_cast<int>(query.size(3));
    params.scale = static_cast<float>(scale);
    params.causal = causal;
    params.rule = static_cast<sm90::Rule>(rule);
    params.dtype = dtype(query);
    if (params.batch == 0 || params.tokens_q == 0 || params.heads == 0) { return; }
    launch(query, [&](cudaStream_t stream) { return sm90::forward(params, stream); });
}

void summarize_blocks_sm90(
    Tensor const& key, Tensor const& value, std::optional<Tensor> const& must_skip, Tensor const& summaries) {
    sm90::SummarizeBlocksParams params{};
    params.key = view(key);
    params.value = view(value);
    params.must_skip = data<int32_t>(must_skip);
    params.summaries = summaries.data_ptr();
    params.batch = static_cast<int>(key.size(0));
    params.tokens_k = static_cast<int>(key.size(1));
    params.kv_heads = static_cast<int>(key.size(2));
    params.head_dim = static_cast<int>(key.size(3));
    params.dtype = dtype(key);
    if (params.batch == 0 || params.tokens_k == 0) { return; }
    launch(key, [&](cudaStream_t stream) { return sm90::summarize_blocks(params, stream); });
}

sm90::SummaryView summary_view(Tensor const& summaries) {
    return {data<uint8_t>(summaries), summaries.stride(0), summaries.stride(1), summaries.stride(2)};
}

void summarize_sm90(Tensor const& key_cache, Tensor const& slot_mapping, Tensor const& summaries) {
    sm90::SummarizeParams params{};
    params.key = paged_view(key_cache);
    params.summaries = summary_view(summaries);
    params.slot_mapping = data<int64_t>(slot_mapping);
    params.tokens = slot_mapping.size(0);
    params.page_size = static_cast<int>(key_cache.size(1));
    params.kv_heads = static_cast<int>(key_cache.size(2));
    params.head_dim = static_cast<int>(key_cache.size(3));
    params.dtype = dtype(key_cache);
    if (params.tokens == 0) { return; }
    launch(key_cache, [&](cudaStream_t stream) { return sm90::summarize(params, stream); });
}

// The layouts of `sm90::DecodeParams`; results and state are written in place. RuntimeError if the launch fails.
void decode_sm90(
    Tensor const& query,
    Tensor const& key_cache,
    Tensor const& value_cache,
    Tensor const& summaries,
    Tensor const& block_table,
    Tensor const& seq_lens,
    Tensor const& slots,
    Tensor const& thresholds,
    Tensor const& visit_all,
    Tensor const& mask,
    Tensor const& out,
    Tensor const& lse,
    Tensor const& visited,
    Tensor const& workspace,
    double scale) {
    sm90::DecodeParams params{};
    params.query = query.data_ptr();
    params.query_row_stride = query.stride(0);
    params.query_head_stride = query.stride(1);
    params.key = paged_view(key_cache);
    params.value = paged_view(value_cache);
    params.summaries = summary_view(summaries);
    params.block_table = data<int32_t>(block_table);
    params.block_table_stride = block_table.stride(0);
    params.seq_lens = data<int32_t>(seq_lens);
    params.slots = data<int32_t>(slots);
    params.thresholds = data<float>(thresholds);
    params.visit_all = data<bool>(visit_all);
    params.mask = data<int32_t>(mask);
    params.mask_slot_stride = mask.stride(0);
    params.mask_head_stride = mask.stride(1);
    params.out = out.data_ptr();
    params.out_row_stride = out.stride(0);
    params.out_head_stride = out.stride(1);
    params.lse = data<float>(lse);
    params.visited = data<int32_t>(visited);
    params.workspace = workspace.data_ptr();
    params.pages = static_cast<int>(key_cache.size(0));
    params.rows = static_cast<int>(query.size(0));
    params.row_pages = static_cast<int>(block_table.size(1));
    params.page_size = static_cast<int>(key_cache.size(1));
    params.heads = static_cast<int>(query.size(1));
    params.kv_heads = static_cast<int>(key_cache.size(2));
    params.head_dim = static_cast<int>(query.size(2));
    params.scale = static_cast<float>(scale);
    params.dtype = dtype(query);
    if (params.rows == 0) { return; }
    launch(query, [&](cudaStream_t stream) { return sm90::decode(params, stream); });
}

}  // namespace
}  // namespace lite_attention

// Lets the loader see that the kernels were built for the sizes that Python works with.
extern "C" __attribute__((visibility("default"))) void lite_attention_tile_sizes(int* tile_q, int* block_k, int* decode_block) {
    *tile_q = lite_attention::sm90::kTileQ;
    *block_k = lite_attention::sm90::kBlockK;
    *decode_block = lite_attention::sm90::kDecodeBlock;
}

extern "C" __attribute__((visibility("default"))) int64_t lite_attention_decode_workspace_bytes(
    int rows, int heads, int kv_heads, int head_dim, int64_t max_tokens) {
    return lite_attention::sm90::decode_workspace_bytes(rows, heads, kv_heads, head_dim, max_tokens);
}

STABLE_TORCH_LIBRARY_FRAGMENT(lite_attention, library) {
    library.def(lite_attention::kForwardSchema);
    library.def(lite_attention::kSummarizeBlocksSchema);
    library.def(lite_attention::kSummarizeSchema);
    library.def(lite_attention::kDecodeSchema);
}

STABLE_TORCH_LIBRARY_IMPL(lite_attention, CUDA, library) {
    library.impl("forward_sm90", TORCH_BOX(&lite_attention::forward_sm90));
    library.impl("summarize_blocks_sm90", TORCH_BOX(&lite_attention::summarize_blocks_sm90));
    library.impl("summarize_sm90", TORCH_BOX(&lite_attention::summarize_sm90));
    library.impl("decode_sm90", TORCH_BOX(&lite_attention::decode_sm90));
}
