// SPDX-License-Identifier: MIT
#pragma once

#include <cutlass/cutlass.h>

namespace lite_attention::sm90 {

// Scores and log-sum-exps are in log2 units.
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Blocks that hold so many tokens, or tiles that hold so many queries.
CUTLASS_HOST_DEVICE constexpr int ceil_div(int count, int size) { return (count + size - 1) / size; }

}  // namespace lite_attention::sm90
