// SPDX-License-Identifier: MIT
// The first kernel of a decode step: which blocks rows that skip visit whatever estimates say. These are those that mattered when
// they were last visited, the first, and the newest two. Few thread blocks do, as they read little, and the second kernel
// runs on the other multiprocessors meanwhile.
#pragma once

#include "work.h"

namespace lite_attention::sm90 {

constexpr int kKnownWarps = 32;
constexpr int kKnownThreadBlocks = 8;  // at most

// Which blocks of a chunk are known to be visited: a lane has the words `lane` and `lane` + kWarp. Runs in a warp.
//
//   mask   the chunk's words of the state
//   first  block of the chunk
struct KnownWords {
    static_assert(kChunkWords == 2 * kWarp);
    uint32_t words[2];

    CUTLASS_DEVICE KnownWords(int32_t const* mask, int first, int blocks) {
        int const lane = threadIdx.x % kWarp;
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 2; ++i) {
            int const begin = first + (i * kWarp + lane) * kWordBlocks;
            words[i] = (begin < blocks ? load_kept(mask + i * kWarp + lane) : 0) | forced_bits(begin, blocks);
            int const missing = begin + kWordBlocks - blocks;
            if (missing > 0) { words[i] = missing < kWordBlocks ? words[i] << missing >> missing : 0; }
        }
    }

    CUTLASS_DEVICE int count() const { return __reduce_add_sync(~0u, __popc(words[0]) + __popc(words[1])); }
    CUTLASS_DEVICE uint32_t operator[](int word) const {
        return __shfl_sync(~0u, word < kWarp ? words[0] : words[1], word % kWarp);
    }
};

// Appends the blocks of a word whose bits are set, of which `first` is the first; returns where to go on. Runs in a warp.
CUTLASS_DEVICE int* append(int* list, int first, uint32_t word) {
    int const lane = threadIdx.x % kWarp;
    if (word >> lane & 1) { store_kept(list + __popc(word & ((1u << lane) - 1)), first + lane); }
    return list + __popc(word);
}

static __global__ void __launch_bounds__(kKnownWarps * kWarp) known_kernel(__grid_constant__ KernelParams const params) {
    cudaTriggerProgrammaticLaunchCompletion();
    DecodeParams const& call = params.call;
    Workspace const& workspace = params.workspace;
    int const lane = threadIdx.x % kWarp;
    int const thread = blockIdx.x * blockDim.x + threadIdx.x;
    if (thread == 0) { *workspace.counters = {}; }
    for (int row = thread; row < call.rows; row += gridDim.x * blockDim.x) { workspace.found_parts[row] = 0; }

    // A warp takes a list at a time.
    for (int number = thread / kWarp; number < lists(params); number += gridDim.x * kKnownWarps) {
        auto const [chunk, pair, row, kv_head] = ChunkOfHead(params, number);
        int const first_block = chunk * kChunkBlocks;
        int32_t const* const mask = words_of_mask(call, row, kv_head) + chunk * kChunkWords;
        RowOptions const options(call, row);
        if (first_block >= options.blocks()) { continue; }
        if (options.everything) {
            if (chunk == 0 && lane == 0) { atomicAdd(&call.visited[row], options.blocks()); }
            // Who attends needs it next, all at the same time.
            if (kv_head == 0) {
                int const last_block = first_block + blocks_of_chunk(options.blocks(), chunk) - 1;
                int const first_page = params.page_blocks.div(first_block);
                int const pages = params.page_blocks.div(last_block) - first_page + 1;
                prefetch(call.block_table + row * call.block_table_stride + first_page, pages * static_cast<int>(sizeof(int32_t)));
            }
            continue;
        }
        KnownWords const known(mask, first_block, options.blocks());
        int const count = known.count();
        if (lane == 0) {
            store_kept(workspace.known + number, count);
            atomicAdd(&call.visited[row], count);
        }
        int* list = workspace.list + pair * workspace.words * kWordBlocks + first_block;
#pragma unroll 4
        for (int word = 0; word < kChunkWords; ++word) { list = append(list, first_block + word * kWordBlocks, known[word]); }
    }
}

}  // namespace lite_attention::sm90
