// SPDX-License-Identifier: MIT
// Each head size and type is compiled in a unit of its own, from forward.cu.
#pragma once

#include "params.h"

namespace lite_attention::sm90 {

// As `forward`, for head_dim up to kHeadDim; `tracking` is 0 for none, else 1 + Rule.
template <int kHeadDim, bool kBFloat16, int kTracking>
char const* launch(ForwardParams const& params, cudaStream_t stream);

}  // namespace lite_attention::sm90
