// SPDX-License-Identifier: MIT
#pragma once

namespace lite_attention::sm90 {

enum class DType : int { kFloat16 = 0, kBFloat16 = 1 };

}  // namespace lite_attention::sm90
