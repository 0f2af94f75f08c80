// SPDX-License-Identifier: MIT
// Where in the memory that a call is given everything stands.
#pragma once

#include <algorithm>
#include <cstdint>

#include "params.h"

namespace lite_attention::sm90 {

struct WorkspaceLayout {
    int words;     // of a row and key head
    int tiles;     // the same
    int chunks;    // the same
    int segments;  // the same
    int heads;     // places for the query heads of a key head: a power of two, and pairs of them are read at a time
    // Offsets in bytes.
    int64_t parts;
    int64_t visits;
    int64_t visited;
    int64_t list;
    int64_t expected;
    int64_t masses;
    int64_t lse;
    int64_t out;
    int64_t bytes;  // of everything

    WorkspaceLayout(int64_t rows, int64_t query_heads, int64_t kv_heads, int64_t head_dim, int64_t max_tokens) {
        constexpr int64_t kSegmentTokens = kSegmentBlocks * kDecodeBlock;
        constexpr int64_t kWordTokens = kWordBlocks * kDecodeBlock;
        words = static_cast<int>((max_tokens + kWordTokens - 1) / kWordTokens);
        tiles = words * (kWordBlocks / kTileBlocks);
        segments = static_cast<int>(std::max<int64_t>(1, (max_tokens + kSegmentTokens - 1) / kSegmentTokens));
        chunks = (segments + kChunkParts - 1) / kChunkParts;
        heads = 2;
        while (heads * kv_heads < query_heads) { heads *= 2; }
        int64_t const pairs = rows * kv_heads;
        auto aligned = [](int64_t count) { return (count * 4 + 255) / 256 * 256; };
        parts = aligned(1);
        visits = parts + aligned(rows);
        visited = visits + aligned(pairs * chunks);
        list = visited + aligned(pairs * words);
        expected = list + aligned(pairs * words * kWordBlocks * 2);
        masses = expected + aligned(pairs * tiles * heads);
        lse = masses + aligned(pairs * words * kWordBlocks * heads);
        out = lse + aligned(pairs * segments * heads);
        bytes = out + aligned(pairs * segments * head_dim * heads);
    }
};

}  // namespace lite_attention::sm90
