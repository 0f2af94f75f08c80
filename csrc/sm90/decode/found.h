// SPDX-License-Identifier: MIT
// Which blocks beside those that are known rows that skip visit: what was estimated of them is compared with what all blocks of a
// key head have together. Some warps of each thread block that attends do so, each a chunk of a row and key head at a time, or
// together where chunks are few.
#pragma once

#include <cutlass/arch/barrier.h>

#include "known.h"
#include "score.h"

namespace lite_attention::sm90 {

// Log2 of the sum of the masses of the blocks that are visited in any case, for the query head lane % heads. Runs in a warp.
template <class Config>
CUTLASS_DEVICE LogSum weigh_forced(KernelParams const& params, int row, int kv_head, int length) {
    using Element = typename Config::Element;
    DecodeParams const& call = params.call;
    int const head = threadIdx.x % kWarp % params.workspace.heads;
    int const blocks = ceil_div(length, kDecodeBlock);
    QueryView<Element> const query(params, row, kv_head);
    auto const block_of = [&](int i) { return max(0, forced_block(i, blocks)); };
    int page[kForced];
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kForced; ++i) { page[i] = call.block_table[row * call.block_table_stride + params.page_blocks.div(block_of(i))]; }
    LogSum sum;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kForced; ++i) {
        int const block = block_of(i);
        bool const exists = i == 0 || block > 0;
        auto const* const keys = static_cast<Element const*>(call.key.data) + page[i] * call.key.page_stride +
                                 params.page_blocks.rem(block) * kDecodeBlock * call.key.token_stride + kv_head * call.key.head_stride;
        CUTLASS_PRAGMA_UNROLL
        for (int tile = 0; tile < Config::kHeadTiles; ++tile) {
            int const count = min(kDecodeBlock, length - block * kDecodeBlock);
            float2 const mass = exact_mass<Config>(keys, call.key.token_stride, count, query, tile * kHeadTile, params.scale_log2);
            // A lane has the heads lane % 4 * 2 and the next.
            float const low = __shfl_sync(~0u, mass.x, head % kHeadTile / 2);
            float const high = __shfl_sync(~0u, mass.y, head % kHeadTile / 2);
            if (exists && head / kHeadTile == tile) { sum.add(head % 2 == 0 ? low : high); }
        }
    }
    return sum;
}

// What a warp that finds tells those of the same chunk.
struct FinderStorage {
    int number;  // of the chunk; the first one's
    int found;
};

// Warps that find the blocks of a chunk together, each in some of its words.
struct Finders {
    int member;   // this warp
    int members;  // a power of two
    int barrier;
    FinderStorage* shared;  // (members,)

    // Takes a chunk that nobody has taken.
    CUTLASS_DEVICE int take(uint32_t* taken) const {
        sync();
        if (member == 0 && threadIdx.x % kWarp == 0) { shared->number = atomicAdd(taken, 1); }
        sync();
        return shared->number;
    }

    // The sum of a number that each has, and that of those before this one. Once for each chunk.
    CUTLASS_DEVICE int2 sums(int number) const {
        if (threadIdx.x % kWarp == 0) { shared[member].found = number; }
        sync();
        int2 sums{};
        for (int other = 0; other < members; ++other) {
            sums.x += shared[other].found;
            if (other < member) { sums.y += shared[other].found; }
        }
        return sums;
    }

  private:
    CUTLASS_DEVICE void sync() const {
        if (members > 1) {
            cutlass::arch::NamedBarrier::sync(members * kWarp, barrier);
        } else {
            __syncwarp();
        }
    }
};

// Lists what is found in a chunk. Runs in the warps that find it together; the first of them is told in how many parts it is.
//
//   wait()  until everything is estimated
template <class Config, class Wait>
CUTLASS_DEVICE int find_blocks(KernelParams const& params, int number, Finders const& finders, Wait wait) {
    DecodeParams const& call = params.call;
    Workspace const& workspace = params.workspace;
    auto const [chunk, pair, row, kv_head] = ChunkOfHead(params, number);
    int const lane = threadIdx.x % kWarp;
    int32_t const* const mask = words_of_mask(call, row, kv_head) + chunk * kChunkWords;
    RowOptions const options(call, row);
    int const of_chunk = blocks_of_chunk(options.blocks(), chunk);
    if (options.everything || of_chunk <= 0) { return 0; }

    int const heads = workspace.heads;
    int const first = chunk * kChunkBlocks;
    KnownWords const known(mask, first, options.blocks());
    LogSum sum = weigh_forced<Config>(params, row, kv_head, options.length);
    if (lane >= heads) { sum = {}; }
    wait();
    // All of it in each warp: so the sum does not depend on how many there are.
    float const* const expected = workspace.expected + pair * workspace.tiles * heads;
    sum.add_all(ceil_div(options.blocks(), kTileBlocks) * heads, [&](int i) { return expected[i]; });
    sum.join_lanes(heads, kWarp);
    // The least log2 of a mass that is worth a visit, for the head lane % heads.
    float const limit = lane % heads < params.group ? options.threshold + sum.log2() : INFINITY;

    // What is read takes long to come, so nothing is written before all is there. A lane has the words that it has of those known.
    uint32_t found[2] = {};
    constexpr int kAtOnce = Config::kOtherRegisters > 100 ? 16 : 8;  // words
    static_assert(kChunkWords / kFinders % kAtOnce == 0);
    int const words = kChunkWords / finders.members;
    int const first_word = finders.member * words;
    int const end_word = min(first_word + words, ceil_div(of_chunk, kWordBlocks));
    float const* const masses = workspace.masses + (pair * workspace.words * kWordBlocks + first) * heads;
    for (int begin = first_word; begin < end_word; begin += kAtOnce) {
        bool matters[kAtOnce] = {};
        for (int head = 0; head < heads; head += 4) {
            float4 may_be[kAtOnce];
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < kAtOnce; ++i) {
                float const* const of_block = masses + min((begin + i) * kWordBlocks + lane, of_chunk - 1) * heads + head;
                if (heads > 2) {
                    may_be[i] = *reinterpret_cast<float4 const*>(of_block);
                } else {
                    may_be[i] = {of_block[0], of_block[1], of_block[0], of_block[1]};
                }
            }
            float4 const least{
                __shfl_sync(~0u, limit, head), __shfl_sync(~0u, limit, head + 1), __shfl_sync(~0u, limit, head + 2),
                __shfl_sync(~0u, limit, head + 3)};
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < kAtOnce; ++i) {
                matters[i] |= may_be[i].x > least.x || may_be[i].y > least.y || may_be[i].z > least.z || may_be[i].w > least.w;
            }
        }
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
            int const word = begin + i;
            uint32_t const of_word = __ballot_sync(~0u, word * kWordBlocks + lane < of_chunk && matters[i]);
            if (word % kWarp == lane) { found[word / kWarp] = of_word & ~known.words[word / kWarp]; }
        }
    }

    uint32_t* const visited = workspace.visited + pair * workspace.words + chunk * kChunkWords;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 2; ++i) {
        int const word = i * kWarp + lane;
        if (word >= first_word && word < end_word) { visited[word] = known.words[i] | found[i]; }
    }
    auto const [listed, before] = finders.sums(__reduce_add_sync(~0u, __popc(found[0]) + __popc(found[1])));
    if (finders.member == 0 && lane == 0) { store_kept(workspace.found + number, listed); }
    if (listed == 0) { return 0; }
    int* list = workspace.list + pair * workspace.words * kWordBlocks + first + known.count() + before;
    for (int word = first_word; word < end_word; ++word) {
        list = append(list, first + word * kWordBlocks, __shfl_sync(~0u, found[word / kWarp], word % kWarp));
    }
    if (finders.member > 0) { return 0; }
    int const parts = parts_of(listed, of_chunk);
    if (lane == 0) {
        atomicAdd(&workspace.found_parts[row], parts);
        atomicAdd(&call.visited[row], listed);
    }
    return parts;
}

// Takes chunks that nobody has taken, and lists what is found in each. Runs in kFinders warps. `shared`: as many.
template <class Config>
CUTLASS_DEVICE void find(KernelParams const& params, FinderStorage* shared, int finder) {
    Counters& counters = *params.workspace.counters;
    int const members = params.finders_together;
    int const team = finder / members;
    Finders const finders{finder % members, members, 1 + team, shared + team * members};  // the consumers have barrier 0
    bool is_estimated = false;
    for (;;) {
        int const number = finders.take(&counters.taken);
        if (number >= lists(params)) { break; }
        auto const parts = static_cast<unsigned long long>(find_blocks<Config>(params, number, finders, [&] {
            if (!is_estimated && threadIdx.x % kWarp == 0) { wait_for(&counters.estimated, params.estimating_warps); }
            is_estimated = true;
            __syncwarp();
        }));
        count_done(&counters.listed, 1 + (parts << 32));
    }
}

}  // namespace lite_attention::sm90
