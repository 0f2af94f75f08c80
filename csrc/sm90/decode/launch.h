// SPDX-License-Identifier: MIT
// Each head size and type is compiled in a unit of its own, from decode.cu.
#pragma once

#include "params.h"

namespace lite_attention::sm90 {

// As `decode`, for head_dim up to kHeadDim.
template <int kHeadDim, bool kBFloat16>
char const* launch_decode(DecodeParams const& params, cudaStream_t stream);

}  // namespace lite_attention::sm90
