// SPDX-License-Identifier: MIT
// Where in the memory that a call is given everything stands.
#pragma once

#include <cstdint>

#include "params.h"

namespace lite_attention::sm90 {

struct WorkspaceLayout {
    int words;     // of a row and key head
    int segments;  // of a row
    // Offsets in bytes; what is zero between calls comes first.
    int64_t visited;
    int64_t expected;
    int64_t masses;
    int64_t lse;
    int64_t out;
    int64_t bytes;  // of everything

    WorkspaceLayout(int64_t rows, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t max_tokens) {
        constexpr int64_t kSegmentTokens = kSegmentBlocks * kDecodeBlock;
        constexpr int64_t kWordTokens = kWordBlocks * kDecodeBlock;
        words = static_cast<int>((max_tokens + kWordTokens - 1) / kWordTokens);
        segments = static_cast<int>((max_tokens + kSegmentTokens - 1) / kSegmentTokens);
        if (segments == 0) { segments = 1; }
        auto aligned = [](int64_t count) { return (count * 4 + 255) / 256 * 256; };
        visited = aligned(1);
        expected = visited + aligned(rows * kv_heads * words);
        masses = expected + aligned(rows * heads * segments);
        lse = masses + aligned(rows * heads * words * kWordBlocks);
        out = lse + aligned(rows * heads * segments);
        bytes = out + aligned(rows * heads * segments * head_dim);
    }
};

}  // namespace lite_attention::sm90
