// SPDX-License-Identifier: MIT
// Picks the kernel of a call: the smallest compiled head size that holds head_dim, and the type.
#include "launch.h"
#include "workspace.h"

namespace lite_attention::sm90 {
namespace {

template <int kHeadDim>
char const* by_type(DecodeParams const& params, cudaStream_t stream) {
    return params.dtype == DType::kBFloat16 ? launch_decode<kHeadDim, true>(params, stream)
                                            : launch_decode<kHeadDim, false>(params, stream);
}

}  // namespace

int64_t decode_workspace_bytes(int rows, int heads, int kv_heads, int head_dim, int64_t max_tokens) {
    return WorkspaceLayout(rows, heads, kv_heads, head_dim, max_tokens).bytes;
}

char const* decode(DecodeParams const& params, cudaStream_t stream) {
    if (params.head_dim <= 64) { return by_type<64>(params, stream); }
    if (params.head_dim <= 128) { return by_type<128>(params, stream); }
    if (params.head_dim <= 192) { return by_type<192>(params, stream); }
    return by_type<256>(params, stream);
}

}  // namespace lite_attention::sm90
