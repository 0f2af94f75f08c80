// SPDX-License-Identifier: MIT
// Where in the memory that a call is given everything stands.
#pragma once

#include <algorithm>
#include <cstdint>

#include "params.h"

namespace lite_attention::sm90 {

// What thread blocks count together. The first kernel sets it to zero.
struct Counters {
    uint32_t drawn;      // parts that were taken beside each thread block's first ones
    uint32_t estimated;  // warps that have estimated all they had to
    uint32_t taken;      // chunks whose blocks somebody finds, or has found
    // Warps that have found the blocks of a chunk, or their share of them, and above these 32 bits in how many parts they are.
    unsigned long long listed;
};

struct WorkspaceLayout {
    int words;     // of a row and key head
    int tiles;     // the same
    int chunks;    // the same
    int slots;     // the same
    int heads;     // places for the query heads of a key head: a power of two, and pairs of them are read at a time
    // Offsets in bytes.
    int64_t found_parts;
    int64_t known;
    int64_t found;
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
        int const segments = static_cast<int>(std::max<int64_t>(1, (max_tokens + kSegmentTokens - 1) / kSegmentTokens));
        slots = segments + (segments + 1) / 2;
        chunks = (segments + kChunkParts - 1) / kChunkParts;
        heads = 2;
        while (heads * kv_heads < query_heads) { heads *= 2; }
        int64_t const pairs = rows * kv_heads;
        auto aligned = [](int64_t count) { return (count * 4 + 255) / 256 * 256; };
        found_parts = aligned(sizeof(Counters) / 4);
        known = found_parts + aligned(rows);
        found = known + aligned(pairs * chunks);
        visited = found + aligned(pairs * chunks);
        list = visited + aligned(pairs * words);
        expected = list + aligned(pairs * words * kWordBlocks);
        masses = expected + aligned(pairs * tiles * heads);
        lse = masses + aligned(pairs * words * kWordBlocks * heads);
        out = lse + aligned(pairs * slots * heads);
        bytes = out + aligned(pairs * slots * head_dim * heads);
    }
};

}  // namespace lite_attention::sm90
