// SPDX-License-Identifier: MIT
// The decode kernel. A thread block works on units, each a segment of a sequence and one key head: some warps score the blocks of
// a unit each and list those to visit, one warp has them fetched, others attend to them together, each with a softmax of its
// own. A second kernel puts the segments together and updates the state. Segments begin at fixed places, so what a row gets does
// not depend on its batch.
#pragma once

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "storage.h"

namespace lite_attention::sm90 {

// What the units of a call leave for the second kernel.
struct Workspace {
    int32_t* drawn;     // units that were taken beside each thread block's first ones; zero between calls
    uint32_t* visited;  // (rows, kv_heads, words) blocks that were visited
    float* masses;      // (rows, kv_heads, blocks, group) log2 of a block's mass, of blocks that were visited
    float* lse;         // (rows, kv_heads, segments, group) of a segment, in log2 units
    float* out;         // (rows, kv_heads, segments, head_dim, group) of a segment; not written where its lse is -inf

    int words;
    int segments;
};

struct KernelParams {
    // (channels of a plane, tokens of a page, planes, key heads, pages); where a box holds one plane, all channels are in it.
    CUtensorMap key;
    CUtensorMap value;
    int box_planes;
    DecodeParams call;
    Workspace workspace;
    int group;  // query heads of a key head
    float scale_log2;
};

CUTLASS_DEVICE int segments_of(int length) { return max(1, ceil_div(length, kSegmentBlocks * kDecodeBlock)); }

template <class Config>
CUTLASS_DEVICE void sync_consumers() {
    // CUTLASS counts from the first barrier that it leaves to others: not __syncthreads', which is the hardware's 0.
    cutlass::arch::NamedBarrier::sync(Config::kConsumers * kWarp, 0);
}

// Fills in which unit of work is the first of each row. Runs in the whole thread block.
template <class Config>
CUTLASS_DEVICE void number_units(KernelParams const& params, SharedStorage<Config>& shared) {
    DecodeParams const& call = params.call;
    int* const first_unit = shared.first_unit;
    for (int row = threadIdx.x; row < call.rows; row += Config::kThreads) {
        first_unit[row] = segments_of(call.seq_lens[row]) * call.kv_heads;
    }
    __syncthreads();
    if (threadIdx.x < kWarp) {
        int before = 0;
        for (int start = 0; start < call.rows; start += kWarp) {
            int const row = start + threadIdx.x;
            int const units = row < call.rows ? first_unit[row] : 0;
            int sum = units;
            CUTLASS_PRAGMA_UNROLL
            for (int distance = 1; distance < kWarp; distance *= 2) {
                int const other = __shfl_up_sync(~0u, sum, distance);
                if (static_cast<int>(threadIdx.x) >= distance) { sum += other; }
            }
            if (row < call.rows) { first_unit[row] = before + sum - units; }
            before += __shfl_sync(~0u, sum, kWarp - 1);
        }
        if (threadIdx.x == 0) { first_unit[call.rows] = before; }
    }
    __syncthreads();
}

// The units of a thread block in their order, for those who work on what the scorers list: the n-th is scorer n modulo
// kScorers'. `action` gets the unit.
template <class Config, class Action>
CUTLASS_DEVICE void for_each_unit(SharedStorage<Config>& shared, Action action) {
    for (uint32_t n = 0;; ++n) {
        int const scorer = shared.units.place(n);
        shared.units.wait_full(n);
        Unit<Config> const& unit = shared.unit[scorer];
        if (unit.row < 0) { break; }
        action(unit);
        __syncwarp();
        if (threadIdx.x % kWarp == 0) { Barrier::arrive(&shared.units.empty[scorer]); }
    }
}

// Takes the n-th unit of a thread block, the next that none has taken. It waits as long as too much is listed, and for its turn:
// otherwise who fetches unit n could wait for it while its scorer waits for later ones to be fetched. `expected`: blocks that it
// will probably visit. A number from `units` on means that there are no more.
template <class Config>
CUTLASS_DEVICE int draw_unit(SharedStorage<Config>& shared, int32_t* drawn, uint32_t n, int units, int expected) {
    auto& turn = *static_cast<uint32_t volatile*>(&shared.turn);
    auto& backlog = *static_cast<int volatile*>(&shared.backlog);
    while (turn != n || backlog >= kBacklog) { __nanosleep(100); }
    int const index = Config::kScorers * gridDim.x + atomicAdd(drawn, 1);
    if (index < units) { atomicAdd(&shared.backlog, expected); }
    __threadfence_block();
    turn = n + 1;
    return index;
}

// Lists what units of work visit. Runs in kScorers warps.
template <class Config>
CUTLASS_DEVICE void plan(KernelParams const& params, SharedStorage<Config>& shared) {
    using Element = typename Config::Element;
    DecodeParams const& call = params.call;
    Workspace const& workspace = params.workspace;
    int const warp = threadIdx.x / kWarp;
    int const lane = threadIdx.x % kWarp;
    int const blocks_of_page = call.page_size / kDecodeBlock;
    int const group = params.group;
    int const units = shared.first_unit[call.rows];
    Unit<Config>& unit = shared.unit[warp];
    ScoringQuery<Config>* const scoring = shared.scoring[warp];

    int expected = 0;  // blocks that are in the backlog before they are listed
    int total = 0;
    for (uint32_t n = warp;; n += Config::kScorers) {
        int index = blockIdx.x + warp * gridDim.x;
        shared.units.wait_empty(n);
        if (n >= Config::kScorers) {
            expected = total;
            if (lane == 0) { index = draw_unit(shared, workspace.drawn, n, units, expected); }
            index = __shfl_sync(~0u, index, 0);
        }
        if (index >= units) {
            if (lane == 0) {
                unit.row = -1;
                Barrier::arrive(&shared.units.full[warp]);
            }
            break;
        }
        int row = 0;
        for (int end = call.rows; row + 1 < end;) {
            int const middle = (row + end) / 2;
            (shared.first_unit[middle] <= index ? row : end) = middle;
        }
        int const kv_head = (index - shared.first_unit[row]) % call.kv_heads;
        int const segment = (index - shared.first_unit[row]) / call.kv_heads;
        int const length = max(0, call.seq_lens[row]);
        float const threshold = call.thresholds[row];
        int const slot = call.slots[row];
        int const blocks = ceil_div(length, kDecodeBlock);
        bool const tracked = threshold != -INFINITY && length > 0;
        bool const everything = !tracked || call.visit_all[row];
        int const first_word = segment * kSegmentWords;
        int const words = min(kSegmentWords, ceil_div(blocks, kWordBlocks) - first_word);
        int64_t const pair = static_cast<int64_t>(row) * call.kv_heads + kv_head;

        // Where the summary of this lane's block of a word is. A block that does not exist has the one of another.
        auto summary_of = [&](int w, int page) -> uint8_t const* {
            int const block = (first_word + w) * kWordBlocks + lane;
            int const place = block < blocks ? block % blocks_of_page : 0;
            return call.summaries.data + page * call.summaries.page_stride + kv_head * call.summaries.head_stride +
                   place * call.summaries.block_stride;
        };
        // Every block's page at first; the list of those to visit grows over it.
        CUTLASS_PRAGMA_UNROLL
        for (int w = 0; w < kSegmentWords; ++w) {
            int const block = (first_word + w) * kWordBlocks + lane;
            int const page = block < blocks ? call.block_table[row * call.block_table_stride + block / blocks_of_page] : 0;
            unit.page[w * kWordBlocks + lane] = page;
            if (!everything && block < blocks) { prefetch(summary_of(w, page), 2 * call.head_dim + 8); }
        }
        Element const* const query = static_cast<Element const*>(call.query) + row * call.query_row_stride +
                                     kv_head * group * call.query_head_stride;
        constexpr int kVector = 8;  // elements that are copied at a time
        constexpr int kRowVectors = Config::kHeadDim / kVector;
        for (int i = lane; i < Config::kHeads * kRowVectors; i += kWarp) {
            int const head = i / kRowVectors;
            int const channel = i % kRowVectors * kVector;
            bool const exists = head < group && channel < call.head_dim;
            *reinterpret_cast<uint4*>(unit.query + head * Config::kQueryRow + channel) =
                exists ? *reinterpret_cast<uint4 const*>(query + head * call.query_head_stride + channel) : uint4{};
        }
        float2 limit[Config::kHeadTiles];
        uint32_t mattered = 0;  // of lanes that are words
        __syncwarp();
        if (!everything) {
            float const* const lse_before = call.lse_state + slot * call.lse_state_stride + kv_head * group;
            CUTLASS_PRAGMA_UNROLL
            for (int tile = 0; tile < Config::kHeadTiles; ++tile) {
                int const head = tile * kHeadTile + lane % 4 * 2;
                limit[tile] = {
                    head < group ? threshold + lse_before[head] * kLog2E : INFINITY,
                    head + 1 < group ? threshold + lse_before[head + 1] * kLog2E : INFINITY};
                scoring[tile].fill(unit.query + tile * kHeadTile * Config::kQueryRow);
            }
            if (lane < words) {
                mattered = call.mask[slot * call.mask_slot_stride + kv_head * call.mask_head_stride + first_word + lane];
            }
            __syncwarp();
        }

        total = 0;
        Summaries<Config> ahead;
        if (!everything) { ahead.load(summary_of(0, unit.page[lane]), 0, call.head_dim); }
#pragma unroll 1
        for (int w = 0; w < words; ++w) {
            int const page = unit.page[w * kWordBlocks + lane];
            int const block = (first_word + w) * kWordBlocks + lane;
            uint32_t word = __ballot_sync(~0u, block < blocks);
            if (!everything) {
                // The first block, and the newest two, which may have no summary yet.
                uint32_t visits = __shfl_sync(~0u, mattered, w) | __ballot_sync(~0u, block == 0 || block >= blocks - 2);
                CUTLASS_PRAGMA_UNROLL
                for (int half = 0; half < 2; ++half) {
                    Summaries<Config> const summaries = ahead;
                    if (half == 0) {
                        ahead.load(summary_of(w, page), 16, call.head_dim);
                    } else if (w + 1 < words) {
                        ahead.load(summary_of(w + 1, unit.page[(w + 1) * kWordBlocks + lane]), 0, call.head_dim);
                    }
                    CUTLASS_PRAGMA_UNROLL
                    for (int tile = 0; tile < Config::kHeadTiles; ++tile) {
                        visits |= summaries.score(scoring[tile], params.scale_log2, limit[tile]) << (half * 16);
                    }
                }
                word &= visits;
            }
            __syncwarp();
            if (word >> lane & 1) {
                int const i = total + __popc(word & ((1u << lane) - 1));
                unit.page[i] = page;
                unit.block[i] = w * kWordBlocks + lane;
            }
            if (lane == 0 && tracked) { workspace.visited[pair * workspace.words + first_word + w] = word; }
            total += __popc(word);
        }
        if (lane == 0) {
            unit.row = row;
            unit.kv_head = kv_head;
            unit.segment = segment;
            unit.length = length;
            unit.blocks = total;
            unit.tracked = tracked;
            atomicAdd(&shared.backlog, total - expected);
        }
        __syncwarp();
        if (lane == 0) { Barrier::arrive(&shared.units.full[warp]); }
    }
}

// Has the listed blocks fetched. Runs in one warp, a few lanes of which take turns: what each waits for overlaps.
template <class Config>
CUTLASS_DEVICE void fetch(KernelParams const& params, SharedStorage<Config>& shared) {
    constexpr int kLanes = 4;
    constexpr uint64_t kHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST);
    int const lane = threadIdx.x % kWarp;
    int const blocks_of_page = params.call.page_size / kDecodeBlock;
    uint32_t fetched = 0;
    for_each_unit(shared, [&](Unit<Config> const& unit) {
        int const blocks = unit.blocks;
        int const kv_head = unit.kv_head;
        int const first_block = unit.segment * kSegmentBlocks;
        for (int first = 0; first < blocks; first += kLanes) {
            int const i = first + lane;
            if (lane < kLanes && i < blocks) {
                int const page = unit.page[i];
                int const token = (first_block + unit.block[i]) % blocks_of_page * kDecodeBlock;
                int const stage = shared.stages.place(fetched + i);
                uint64_t* const full = &shared.stages.full[stage];
                shared.stages.wait_empty(fetched + i);
                CopyBarrier::arrive_and_expect_tx(full, Config::kStageBytes);
                auto copy = [&](CUtensorMap const& map, typename Config::Element* to) {
                    to += stage * Config::kStageElements;
                    if (params.box_planes == Config::kPlanes) {
                        cute::SM90_TMA_LOAD_5D::copy(&map, full, kHint, to, 0, token, 0, kv_head, page);
                        return;
                    }
                    CUTLASS_PRAGMA_UNROLL
                    for (int plane = 0; plane < Config::kPlanes; ++plane) {
                        cute::SM90_TMA_LOAD_5D::copy(
                            &map, full, kHint, to + plane * kDecodeBlock * kPlane, plane * kPlane, token, 0, kv_head, page);
                    }
                };
                copy(params.key, shared.key);
                copy(params.value, shared.value);
            }
            // No lane may wait for a stage that another has yet to fill the time before.
            __syncwarp();
            if (lane == 0) { atomicSub(&shared.backlog, min(kLanes, blocks - first)); }
        }
        fetched += blocks;
    });
}

// Four 8 x 8 matrices from shared memory; lanes 8 i to 8 i + 7 give the rows of the i-th.
CUTLASS_DEVICE void load_matrices(uint32_t (&matrices)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(address));
}
CUTLASS_DEVICE void load_transposed(uint32_t (&matrices)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(address));
}
CUTLASS_DEVICE uint32_t transpose(uint32_t matrix) {
    uint32_t transposed;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(matrix));
    return transposed;
}

CUTLASS_DEVICE uint32_t pack(float low, float high, __half) { return bits(__floats2half2_rn(low, high)); }
CUTLASS_DEVICE uint32_t pack(float low, float high, __nv_bfloat16) {
    __nv_bfloat162 const pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<uint32_t const&>(pair);
}

// Over the eight lanes that hold other keys, or channels, of the same heads.
template <class Join>
CUTLASS_DEVICE float join_keys(float value, Join join) {
    CUTLASS_PRAGMA_UNROLL
    for (int distance = 4; distance < kWarp; distance *= 2) {
        value = join(value, __shfl_xor_sync(~0u, value, distance));
    }
    return value;
}
CUTLASS_DEVICE float add(float a, float b) { return a + b; }

// What a warp has gathered of a segment. Products have keys or channels as rows and heads as columns: a thread holds the heads
// 2 * (lane % 4) and the one after, at rows lane / 4 and 8 further.
template <class Config>
struct Gathered {
    static constexpr int kTiles = Config::kHeadDim / 16;
    float max[Config::kHeadTiles][2];
    float sum[Config::kHeadTiles][2];  // of this thread's keys
    float out[Config::kHeadTiles][kTiles][4];

    CUTLASS_DEVICE Gathered() {
        CUTLASS_PRAGMA_UNROLL
        for (int tile = 0; tile < Config::kHeadTiles; ++tile) {
            max[tile][0] = max[tile][1] = -INFINITY;
            sum[tile][0] = sum[tile][1] = 0.0f;
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < kTiles * 4; ++i) { out[tile][i / 4][i % 4] = 0.0f; }
        }
    }
};

// Adds a block whose keys and values lie at those addresses of shared memory. `keys`: how many of its keys exist. `masses`:
// where to note what each head's block weighs, null for nowhere.
template <class Config>
CUTLASS_DEVICE void attend(
    Gathered<Config>& gathered, uint32_t key, uint32_t value, uint32_t const (&query)[Config::kHeadTiles][Config::kHeadDim / 16][2],
    int keys, float scale_log2, float* masses, int group) {
    using Element = typename Config::Element;
    constexpr int kTiles = Config::kHeadDim / 16;
    constexpr uint32_t kPlaneBytes = kDecodeBlock * kPlane * 2;
    int const lane = threadIdx.x % kWarp;
    // Rows of 128 bytes whose 16-byte pieces the copy engine has put in another order in each.
    auto address = [&](uint32_t base, int row, int tile, int piece) {
        return base + tile / 4 * kPlaneBytes + row * 128 + ((tile % 4 * 2 + piece) ^ row % 8) * 16;
    };

    // Two chains of products are twice as fast as one.
    float scores[Config::kHeadTiles][2][4] = {};
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kTiles; ++i) {
        uint32_t matrices[4];
        load_matrices(matrices, address(key, lane % 16, i, lane / 16));
        CUTLASS_PRAGMA_UNROLL
        for (int tile = 0; tile < Config::kHeadTiles; ++tile) {
            mma(scores[tile][i % 2], matrices, query[tile][i][0], query[tile][i][1], Element{});
        }
    }
    uint32_t weights[Config::kHeadTiles][2];
    CUTLASS_PRAGMA_UNROLL
    for (int tile = 0; tile < Config::kHeadTiles; ++tile) {
        float score[4];
        CUTLASS_PRAGMA_UNROLL
        for (int j = 0; j < 4; ++j) {
            bool const exists = lane / 4 + j / 2 * 8 < keys;
            score[j] = exists ? (scores[tile][0][j] + scores[tile][1][j]) * scale_log2 : -INFINITY;
        }
        float block_sum[2];
        float offset[2];
        CUTLASS_PRAGMA_UNROLL
        for (int h = 0; h < 2; ++h) {
            float const before = gathered.max[tile][h];
            float const now = fmaxf(before, join_keys(fmaxf(score[h], score[h + 2]), fmaxf));
            offset[h] = now == -INFINITY ? 0.0f : now;
            if (__any_sync(~0u, now > before)) {
                float const factor = exp2f(before - offset[h]);
                gathered.sum[tile][h] *= factor;
                CUTLASS_PRAGMA_UNROLL
                for (int i = 0; i < kTiles; ++i) {
                    gathered.out[tile][i][h] *= factor;
                    gathered.out[tile][i][h + 2] *= factor;
                }
                gathered.max[tile][h] = now;
            }
            score[h] = exp2f(score[h] - offset[h]);
            score[h + 2] = exp2f(score[h + 2] - offset[h]);
            block_sum[h] = score[h] + score[h + 2];
            gathered.sum[tile][h] += block_sum[h];
        }
        weights[tile][0] = transpose(pack(score[0], score[1], Element{}));
        weights[tile][1] = transpose(pack(score[2], score[3], Element{}));
        if (masses != nullptr) {
            CUTLASS_PRAGMA_UNROLL
            for (int h = 0; h < 2; ++h) {
                float const mass = log2f(join_keys(block_sum[h], add)) + offset[h];
                int const head = tile * kHeadTile + lane * 2 + h;
                if (lane < 4 && head < group) { masses[head] = mass; }
            }
        }
    }
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kTiles; ++i) {
        uint32_t matrices[4];
        load_transposed(matrices, address(value, lane % 8 + lane / 16 * 8, i, lane / 8 % 2));
        CUTLASS_PRAGMA_UNROLL
        for (int tile = 0; tile < Config::kHeadTiles; ++tile) {
            mma(gathered.out[tile][i], matrices, weights[tile][0], weights[tile][1], Element{});
        }
    }
}

// Puts together what the warps have gathered of a segment, for the second kernel. Runs in the consumers.
template <class Config>
CUTLASS_DEVICE void merge(
    KernelParams const& params, SharedStorage<Config>& shared, Unit<Config> const& unit, Gathered<Config> const& gathered,
    int thread) {
    Workspace const& workspace = params.workspace;
    int const group = params.group;
    int const head_dim = params.call.head_dim;
    int const warp = thread / kWarp;
    int const lane = thread % kWarp;
    int64_t const part =
        (static_cast<int64_t>(unit.row) * params.call.kv_heads + unit.kv_head) * workspace.segments + unit.segment;
    if (unit.blocks == 0) {
        if (thread < group) { workspace.lse[part * group + thread] = -INFINITY; }
        return;
    }
    CUTLASS_PRAGMA_UNROLL
    for (int tile = 0; tile < Config::kHeadTiles; ++tile) {
        CUTLASS_PRAGMA_UNROLL
        for (int h = 0; h < 2; ++h) {
            float const sum = join_keys(gathered.sum[tile][h], add);
            if (lane < 4) {
                shared.max[warp][tile * kHeadTile + lane * 2 + h] = gathered.max[tile][h];
                shared.sum[warp][tile * kHeadTile + lane * 2 + h] = sum;
            }
        }
    }
    sync_consumers<Config>();
    CUTLASS_PRAGMA_UNROLL
    for (int tile = 0; tile < Config::kHeadTiles; ++tile) {
        float factor[2];
        CUTLASS_PRAGMA_UNROLL
        for (int h = 0; h < 2; ++h) {
            int const head = tile * kHeadTile + lane % 4 * 2 + h;
            float largest = -INFINITY;
            CUTLASS_PRAGMA_UNROLL
            for (int w = 0; w < Config::kConsumers; ++w) { largest = fmaxf(largest, shared.max[w][head]); }
            float const offset = largest == -INFINITY ? 0.0f : largest;
            float sum = 0.0f;
            CUTLASS_PRAGMA_UNROLL
            for (int w = 0; w < Config::kConsumers; ++w) { sum += shared.sum[w][head] * exp2f(shared.max[w][head] - offset); }
            factor[h] = sum == 0.0f ? 0.0f : exp2f(gathered.max[tile][h] - offset) / sum;
            if (warp == 0 && lane < 4 && head < group) { workspace.lse[part * group + head] = offset + log2f(sum); }
        }
        CUTLASS_PRAGMA_UNROLL
        for (int slice = 0; slice < Config::kPlanes; ++slice) {
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < kPlane / 16; ++i) {
                float const (&out)[4] = gathered.out[tile][slice * (kPlane / 16) + i];
                CUTLASS_PRAGMA_UNROLL
                for (int r = 0; r < 2; ++r) {
                    shared.slice[warp][(i * 16 + r * 8) * (kHeadTile / 2) + lane] = {
                        out[2 * r] * factor[0], out[2 * r + 1] * factor[1]};
                }
            }
            sync_consumers<Config>();
            float2 sum{};
            CUTLASS_PRAGMA_UNROLL
            for (int w = 0; w < Config::kConsumers; ++w) {
                float2 const addend = shared.slice[w][thread];
                sum.x += addend.x;
                sum.y += addend.y;
            }
            int const channel = slice * kPlane + thread / 4;
            int const head = tile * kHeadTile + thread % 4 * 2;
            float* const out = workspace.out + (part * head_dim + channel) * group + head;
            if (channel < head_dim && head < group) { out[0] = sum.x; }
            if (channel < head_dim && head + 1 < group) { out[1] = sum.y; }
            sync_consumers<Config>();
        }
    }
}

// Attends to what is fetched. Runs in kConsumers warps.
template <class Config>
CUTLASS_DEVICE void consume(KernelParams const& params, SharedStorage<Config>& shared, int thread) {
    constexpr int kTiles = Config::kHeadDim / 16;
    Workspace const& workspace = params.workspace;
    int const group = params.group;
    int const warp = thread / kWarp;
    int const lane = thread % kWarp;
    uint32_t fetched = 0;
    for_each_unit(shared, [&](Unit<Config> const& unit) {
        int const blocks = unit.blocks;

        uint32_t query[Config::kHeadTiles][kTiles][2];
        CUTLASS_PRAGMA_UNROLL
        for (int tile = 0; tile < Config::kHeadTiles; ++tile) {
            auto const* const row = unit.query + (tile * kHeadTile + lane / 4) * Config::kQueryRow + lane % 4 * 2;
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < kTiles; ++i) {
                query[tile][i][0] = *reinterpret_cast<uint32_t const*>(row + i * 16);
                query[tile][i][1] = *reinterpret_cast<uint32_t const*>(row + i * 16 + 8);
            }
        }
        float* const masses =
            workspace.masses + (static_cast<int64_t>(unit.row) * params.call.kv_heads + unit.kv_head) * workspace.words *
                                   kWordBlocks * group;
        Gathered<Config> gathered;
        for (int i = warp; i < blocks; i += Config::kConsumers) {
            int const block = unit.segment * kSegmentBlocks + unit.block[i];
            int const keys = unit.length - block * kDecodeBlock;
            int const stage = shared.stages.place(fetched + i);
            auto* const value = shared.value + stage * Config::kStageElements;
            shared.stages.wait_full(fetched + i);
            if (keys < kDecodeBlock) {
                // What stands behind the end of a sequence may be anything, and no weight makes a NaN vanish.
                for (int j = lane; j < Config::kPlanes * (kDecodeBlock - keys) * 8; j += kWarp) {
                    int const row = j / 8 % (kDecodeBlock - keys) + keys;
                    int const plane = j / 8 / (kDecodeBlock - keys);
                    reinterpret_cast<uint4*>(value)[(plane * kDecodeBlock + row) * 8 + j % 8] = uint4{};
                }
                cutlass::arch::fence_view_async_shared();
                __syncwarp();
            }
            attend<Config>(
                gathered, cute::cast_smem_ptr_to_uint(shared.key + stage * Config::kStageElements),
                cute::cast_smem_ptr_to_uint(value), query, keys, params.scale_log2,
                unit.tracked ? masses + static_cast<int64_t>(block) * group : nullptr, group);
            __syncwarp();
            if (lane == 0) { Barrier::arrive(&shared.stages.empty[stage]); }
        }
        fetched += blocks;
        merge(params, shared, unit, gathered, thread);
    });
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1) decode_kernel(__grid_constant__ KernelParams const params) {
    extern __shared__ __align__(1024) uint8_t memory[];
    auto& shared = *reinterpret_cast<SharedStorage<Config>*>(memory);
    if (threadIdx.x == 0) {
        shared.units.init(1, Config::kConsumers + 1);
        shared.stages.init(1, 1);
        shared.turn = Config::kScorers;
        shared.backlog = 0;
        cutlass::arch::fence_barrier_init();
        cute::prefetch_tma_descriptor(&params.key);
        cute::prefetch_tma_descriptor(&params.value);
    }
    number_units(params, shared);
    int const warp = threadIdx.x / kWarp;
    if (warp < Config::kScorers) {
        plan(params, shared);
    } else if (warp < Config::kScorers + Config::kConsumers) {
        consume(params, shared, threadIdx.x - Config::kScorers * kWarp);
    } else {
        fetch(params, shared);
    }
    cudaTriggerProgrammaticLaunchCompletion();
}

}  // namespace lite_attention::sm90
