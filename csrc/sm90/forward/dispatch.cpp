// SPDX-License-Identifier: MIT
// Picks the kernel of a call: the smallest compiled head size that holds head_dim, the type, what is tracked.
#include "launch.h"

namespace lite_attention::sm90 {
namespace {

template <int kHeadDim, bool kBFloat16>
char const* by_tracking(ForwardParams const& params, cudaStream_t stream) {
    if (params.mask == nullptr) { return launch<kHeadDim, kBFloat16, 0>(params, stream); }
    switch (params.rule) {
        case Rule::kRunningMax: return launch<kHeadDim, kBFloat16, 1>(params, stream);
        case Rule::kMass: return launch<kHeadDim, kBFloat16, 2>(params, stream);
        case Rule::kMassSummaries: return launch<kHeadDim, kBFloat16, 3>(params, stream);
    }
    return "unknown rule";
}

template <int kHeadDim>
char const* by_type(ForwardParams const& params, cudaStream_t stream) {
    return params.dtype == DType::kBFloat16 ? by_tracking<kHeadDim, true>(params, stream)
                                            : by_tracking<kHeadDim, false>(params, stream);
}

}  // namespace

char const* forward(ForwardParams const& params, cudaStream_t stream) {
    if (params.head_dim <= 64) { return by_type<64>(params, stream); }
    if (params.head_dim <= 96) { return by_type<96>(params, stream); }
    if (params.head_dim <= 128) { return by_type<128>(params, stream); }
    if (params.head_dim <= 192) { return by_type<192>(params, stream); }
    return by_type<256>(params, stream);
}

}  // namespace lite_attention::sm90
