// SPDX-License-Identifier: MIT
// The CUDA kernels as PyTorch operators. Only PyTorch's stable ABI is used, so one build serves every PyTorch from
// 2.11 on and every Python. `lite_attention/forward_cuda.py` calls what is registered here, with checked arguments.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "sm90/forward/config.h"
#include "sm90/forward/params.h"

// PyTorch's header declares it only where PyTorch itself was built for CUDA; to compile, a CPU build is enough.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace lite_attention {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr char const* kSchema =
    "forward_sm90(Tensor query, Tensor key, Tensor value, Tensor(a!) out, Tensor(b!) lse, Tensor(c!) counter, "
    "Tensor(d!)? mask, Tensor(e!)? lse_state, Tensor? thresholds, Tensor? must_visit, Tensor? must_skip, "
    "float scale, bool causal, bool mass) -> ()";

sm90::TensorView view(Tensor const& tensor) {
    return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
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

// The layouts of `sm90::ForwardParams`; results and state are written in place. RuntimeError if the launch fails.
void forward_sm90(
    Tensor const& query,
    Tensor const& key,
    Tensor const& value,
    Tensor const& out,
    Tensor const& lse,
    Tensor const& counter,
    std::optional<Tensor> const& mask,
    std::optional<Tensor> const& lse_state,
    std::optional<Tensor> const& thresholds,
    std::optional<Tensor> const& must_visit,
    std::optional<Tensor> const& must_skip,
    double scale,
    bool causal,
    bool mass) {
    sm90::ForwardParams params{};
    params.query = view(query);
    params.key = view(key);
    params.value = view(value);
    params.out = view(out);
    params.lse = data<float>(lse);
    params.counter = data<int32_t>(counter);
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
    params.batch = static_cast<int>(query.size(0));
    params.tokens_q = static_cast<int>(query.size(1));
    params.tokens_k = static_cast<int>(key.size(1));
    params.heads = static_cast<int>(query.size(2));
    params.kv_heads = static_cast<int>(key.size(2));
    params.head_dim = static_cast<int>(query.size(3));
    params.scale = static_cast<float>(scale);
    params.causal = causal;
    params.rule = mass ? sm90::Rule::kMass : sm90::Rule::kRunningMax;
    params.dtype = dtype(query);
    if (params.batch == 0 || params.tokens_q == 0 || params.heads == 0) { return; }

    int32_t const device = query.get_device_index();
    torch::stable::accelerator::DeviceGuard const guard(device);
    char const* const error = sm90::forward(params, current_stream(device));
    STD_TORCH_CHECK(error == nullptr, error);
}

}  // namespace
}  // namespace lite_attention

// Lets the loader see that the kernels were built for the sizes that Python works with.
extern "C" __attribute__((visibility("default"))) void lite_attention_tile_sizes(int* tile_q, int* block_k) {
    *tile_q = lite_attention::sm90::kTileQ;
    *block_k = lite_attention::sm90::kBlockK;
}

STABLE_TORCH_LIBRARY_FRAGMENT(lite_attention, library) { library.def(lite_attention::kSchema); }

STABLE_TORCH_LIBRARY_IMPL(lite_attention, CUDA, library) {
    library.impl("forward_sm90", TORCH_BOX(&lite_attention::forward_sm90));
}
