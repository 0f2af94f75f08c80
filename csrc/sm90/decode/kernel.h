// SPDX-License-Identifier: MIT
// The third kernel of a decode step. Some warps look up what a part visits, one warp has it fetched, others attend to it together,
// each with a softmax of its own. What it leaves of each part the next kernel puts together. Thread blocks begin as those of the
// second kernel end, with what is known to be visited; others find the rest once everything is estimated.
#pragma once

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cutlass/arch/reg_reconfig.h>

#include "storage.h"

namespace lite_attention::sm90 {

// Notes the rows, and how many parts of each can be attended to at once: all, or those that are known. Runs in a whole thread block.
CUTLASS_DEVICE void count_parts(KernelParams const& params, RowTable& rows) {
    DecodeParams const& call = params.call;
    int* const of_row = rows.first_unit();
    for (int row = threadIdx.x; row < call.rows; row += blockDim.x) { of_row[row] = 0; }
    __syncthreads();
    for (int number = threadIdx.x; number < lists(params); number += blockDim.x) {
        auto const [chunk, pair, row, kv_head] = ChunkOfHead(params, number);
        int const known = params.workspace.known[number];  // if the row has such a list; asked for with its options
        RowOptions const options(call, row);
        if (kv_head == 0 && chunk == 0) { rows.note(call.rows, row, options); }
        int const blocks = blocks_of_chunk(options.blocks(), chunk);
        if (blocks > 0) { atomicAdd(&of_row[row], options.everything ? parts_of_all(blocks) : parts_of(known, blocks)); }
    }
}

// Which item the part is of, `index` among the parts of all. Then `index` is that among the item's own. Runs in a warp.
template <class Count>
CUTLASS_DEVICE int find_item(int& index, int items, Count count) {
    for (int first = 0;; first += kWarp) {
        int const item = first + static_cast<int>(threadIdx.x % kWarp);
        int const parts = item < items ? count(item) : 0;
        int const before = sum_of_lanes_before(parts);
        uint32_t const behind = __ballot_sync(~0u, index < before + parts);
        if (behind != 0) {
            int const source = __ffs(behind) - 1;
            index -= __shfl_sync(~0u, before, source);
            return first + source;
        }
        index -= __shfl_sync(~0u, before + parts, kWarp - 1);
    }
}

// The part of a row, `index` among those that are known, or those that are found. They are ordered by their place first (in rows
// that skip, by their chunk), so that neighbours are of neighbouring key heads, which lie side by side. Runs in a warp.
CUTLASS_DEVICE Part find_part(KernelParams const& params, int row, RowShape const& shape, int index, bool found) {
    Workspace const& workspace = params.workspace;
    int const kv_heads = params.call.kv_heads;
    Part part{row, 0, 0, 0, 0, 0, shape.length, shape.tracked, shape.everything};
    auto const cut = [&](int visits, int parts) {
        int const least = visits / parts;
        int const larger = visits - least * parts;  // that have one block more
        part.first = least * part.number + min(larger, part.number);
        part.blocks = least + (part.number < larger);
    };
    if (shape.everything) {
        int segment;
        params.kv_heads(segment, part.kv_head, index);
        part.chunk = segment / kChunkParts;
        part.number = segment % kChunkParts;
        int const blocks = blocks_of_chunk(shape.blocks(), part.chunk);
        cut(blocks, parts_of_all(blocks));
        return part;
    }
    auto const place = [&](int list) {
        int chunk;
        int kv_head;
        params.kv_heads(chunk, kv_head, list);
        return (static_cast<int64_t>(row) * kv_heads + kv_head) * workspace.chunks + chunk;
    };
    auto const parts_of_list = [&](int visits, int list) {
        return parts_of(visits, blocks_of_chunk(shape.blocks(), params.kv_heads.div(list)));
    };
    int const list = find_item(index, kv_heads * ceil_div(shape.blocks(), kChunkBlocks), [&](int list) {
        return parts_of_list((found ? workspace.found : workspace.known)[place(list)], list);
    });
    params.kv_heads(part.chunk, part.kv_head, list);
    part.number = index;
    int const known = workspace.known[place(list)];
    if (found) {
        int const visits = workspace.found[place(list)];
        cut(visits, parts_of_list(visits, list));
        part.first += known;
        part.number += parts_of_list(known, list);
    } else {
        cut(known, parts_of_list(known, list));
    }
    return part;
}

// The parts of a thread block in their order, for those who work on what the planners look up: they have it by turns. `action` gets
// the unit, and leaves it.
template <class Config, class Action>
CUTLASS_DEVICE void for_each_unit(SharedStorage<Config>& shared, Action action) {
    for (uint32_t n = 0;; ++n) {
        shared.units.wait_full(n);
        Unit<Config> const& unit = shared.unit[shared.units.place(n)];
        if (unit.part.row < 0) { break; }
        action(unit);
    }
}

// Takes the n-th part of a thread block, the next that none has taken. It waits as long as too much is listed, and for its turn:
// otherwise who fetches part n could wait for it while its planner waits for later ones to be fetched. `expected`: blocks that it
// will probably visit, which are in the backlog from then on.
template <class Config>
CUTLASS_DEVICE int draw_part(SharedStorage<Config>& shared, uint32_t* drawn, uint32_t n, int expected) {
    while (atomicAdd(&shared.turn, 0) != n || atomicAdd(&shared.backlog, 0) >= kBacklog) { __nanosleep(100); }
    int const index = gridDim.x + atomicAdd(drawn, 1);  // behind those that are dealt out
    atomicAdd(&shared.backlog, expected);
    __threadfence_block();
    atomicExch(&shared.turn, n + 1);
    return index;
}

// The parts of all rows that are found, once all are. Runs in a warp.
CUTLASS_DEVICE int wait_for_found_parts(KernelParams const& params) {
    int const lane = threadIdx.x % kWarp;
    unsigned long long listed = 0;
    if (lane == 0) { listed = wait_for(&params.workspace.counters->listed, lists(params) * params.finders_together); }
    return __shfl_sync(~0u, static_cast<int>(listed >> 32), 0);
}

// Looks up what parts visit. Runs in kPlanners warps. What is read of the device's memory is asked for at once as far as can be.
template <class Config>
CUTLASS_DEVICE void plan(KernelParams const& params, SharedStorage<Config>& shared) {
    using Element = typename Config::Element;
    DecodeParams const& call = params.call;
    Workspace const& workspace = params.workspace;
    int const warp = threadIdx.x / kWarp;
    int const lane = threadIdx.x % kWarp;
    int const* const first_part = shared.rows.first_unit();
    int const known_parts = first_part[call.rows];
    Unit<Config>& unit = shared.unit[warp];
    int found_parts = -1;  // not known yet

    int expected = 0;  // blocks that are in the backlog before they are listed
    int blocks = 0;
    for (uint32_t n = warp;; n += Config::kPlanners) {
        int index = blockIdx.x;
        shared.units.wait_empty(n);
        if (n > 0) {
            expected = blocks;
            if (lane == 0) { index = draw_part(shared, &workspace.counters->drawn, n, expected); }
            index = __shfl_sync(~0u, index, 0);
        }
        bool const found = index >= known_parts;
        int row;
        if (found) {
            index -= known_parts;
            if (found_parts < 0) { found_parts = wait_for_found_parts(params); }
            if (index >= found_parts) {
                if (lane == 0) {
                    unit.part.row = -1;
                    atomicSub(&shared.backlog, expected);
                }
                Barrier::arrive(&shared.units.full[warp]);
                break;
            }
            row = find_item(index, call.rows, [&](int row) { return workspace.found_parts[row]; });
        } else {
            row = row_of(first_part, call.rows, index);
            index -= first_part[row];
        }
        Part const part = find_part(params, row, shared.rows.shape(call.rows, row), index, found);
        blocks = part.blocks;

        int64_t const pair = static_cast<int64_t>(row) * call.kv_heads + part.kv_head;
        int const first_block = part.chunk * kChunkBlocks;
        int const* const list = workspace.list + pair * workspace.words * kWordBlocks + first_block;
        Visit visits[kSegmentBlocks / kWarp];
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kSegmentBlocks / kWarp; ++i) {
            int const at = part.first + i * kWarp + lane;
            if (i * kWarp + lane < blocks) { visits[i].block = part.everything ? first_block + at : list[at]; }
        }
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kSegmentBlocks / kWarp; ++i) {
            if (i * kWarp + lane < blocks) {
                visits[i].page = load_kept(call.block_table + row * call.block_table_stride + params.page_blocks.div(visits[i].block));
            }
        }
        QueryView<Element> const query(params, row, part.kv_head);
        constexpr int kVector = 8;  // channels that are copied at a time
        constexpr int kRowVectors = Config::kHeadDim / kVector;
        constexpr int kQueryVectors = Config::kHeads * kRowVectors / kWarp;  // of a lane
        uint4 of_query[kQueryVectors];
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kQueryVectors; ++i) {
            int const vector = i * kWarp + lane;
            of_query[i] = query.load(vector / kRowVectors, vector % kRowVectors * kVector);
        }
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kSegmentBlocks / kWarp; ++i) {
            if (i * kWarp + lane < blocks) { unit.list[i * kWarp + lane] = visits[i]; }
        }
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kQueryVectors; ++i) {
            int const vector = i * kWarp + lane;
            int const at = vector / kRowVectors * Config::kQueryRow + vector % kRowVectors * kVector;
            *reinterpret_cast<uint4*>(unit.query + at) = of_query[i];
        }
        if (lane == 0) {
            unit.part = part;
            atomicAdd(&shared.backlog, blocks - expected);
        }
        Barrier::arrive(&shared.units.full[warp]);
    }
}

// Has the listed blocks fetched. Runs in one warp, a few lanes of which take turns: what each waits for overlaps.
template <class Config>
CUTLASS_DEVICE void fetch(KernelParams const& params, SharedStorage<Config>& shared) {
    constexpr int kLanes = 4;
    using Hint = cute::TMA::CacheHintSm90;
    int const lane = threadIdx.x % kWarp;
    uint32_t fetched = 0;
    for_each_unit(shared, [&](Unit<Config> const& unit) {
        int const blocks = unit.part.blocks;
        int const kv_head = unit.part.kv_head;
        // What is in the L2 cache has to go at some time, if it is to be written back: better at once, than between reads. Where
        // there are summaries, they drive it out.
        bool const drive_out = fetched == 0 && unit.part.everything;
        auto const hint = static_cast<uint64_t>(drive_out ? Hint::EVICT_NORMAL : Hint::EVICT_FIRST);
        for (int first = 0; first < blocks; first += kLanes) {
            int const i = first + lane;
            if (lane < kLanes && i < blocks) {
                int const page = unit.list[i].page;
                int const token = params.page_blocks.rem(unit.list[i].block) * kDecodeBlock;
                int const stage = shared.stages.place(fetched + i);
                uint64_t* const full = &shared.stages.full[stage];
                shared.stages.wait_empty(fetched + i);
                CopyBarrier::arrive_and_expect_tx(full, Config::kStageBytes);
                auto copy = [&](CUtensorMap const& map, typename Config::Element* to) {
                    to += stage * Config::kStageElements;
                    if (params.box_planes == Config::kPlanes) {
                        cute::SM90_TMA_LOAD_5D::copy(&map, full, hint, to, 0, token, 0, kv_head, page);
                        return;
                    }
                    CUTLASS_PRAGMA_UNROLL
                    for (int plane = 0; plane < Config::kPlanes; ++plane) {
                        cute::SM90_TMA_LOAD_5D::copy(
                            &map, full, hint, to + plane * kDecodeBlock * kPlane, plane * kPlane, token, 0, kv_head, page);
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
        leave(shared, unit);
    });
}

// What a warp has gathered of a part.
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

// The queries of a part as second operands. They stay in registers as long as there are enough.
template <class Config>
class QueryOperands {
  public:
    CUTLASS_DEVICE explicit QueryOperands(Unit<Config> const& unit)
        : own_(unit.query + threadIdx.x % kWarp / 4 * Config::kQueryRow + threadIdx.x % 4 * 2) {
        if constexpr (kKept) {
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < Config::kHeadDim / 16; ++i) { kept_[i] = load(0, i); }
        }
    }

    // Of eight heads and the i-th 16 channels.
    CUTLASS_DEVICE uint2 operator()(int tile, int i) const {
        if constexpr (kKept) {
            return kept_[i];
        } else {
            return load(tile, i);
        }
    }

  private:
    static constexpr bool kKept = Config::kHeadTiles == 1;

    CUTLASS_DEVICE uint2 load(int tile, int i) const {
        auto const* const at = own_ + tile * kHeadTile * Config::kQueryRow + i * 16;
        return {*reinterpret_cast<uint32_t const*>(at), *reinterpret_cast<uint32_t const*>(at + 8)};
    }

    typename Config::Element const* own_;
    uint2 kept_[kKept ? Config::kHeadDim / 16 : 1];
};

// Adds a block whose keys and values lie at those addresses of shared memory. `keys`: how many of its keys exist. `masses`:
// where to note what each head's block weighs, null for nowhere.
template <class Config>
CUTLASS_DEVICE void attend(
    Gathered<Config>& gathered, uint32_t key, uint32_t value, QueryOperands<Config> const& query, int keys, float scale_log2,
    float* masses, int heads) {
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
            uint2 const of_query = query(tile, i);
            mma(scores[tile][i % 2], matrices, of_query.x, of_query.y, Element{});
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
            float const now = fmaxf(before, join_rows(fmaxf(score[h], score[h + 2]), fmaxf));
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
            float2 const mass{
                log2f(join_rows(block_sum[0], add)) + offset[0], log2f(join_rows(block_sum[1], add)) + offset[1]};
            int const head = tile * kHeadTile + lane * 2;
            if (lane < 4 && head < heads) { store_kept(masses + head, mass); }
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

// Tells the other consumers what the weights that a warp has gathered sum up to.
template <class Config>
CUTLASS_DEVICE void share(SharedStorage<Config>& shared, Gathered<Config> const& gathered, int warp) {
    int const lane = threadIdx.x % kWarp;
    CUTLASS_PRAGMA_UNROLL
    for (int tile = 0; tile < Config::kHeadTiles; ++tile) {
        CUTLASS_PRAGMA_UNROLL
        for (int h = 0; h < 2; ++h) {
            float const sum = join_rows(gathered.sum[tile][h], add);
            if (lane < 4) {
                shared.max[warp][tile * kHeadTile + lane * 2 + h] = gathered.max[tile][h];
                shared.sum[warp][tile * kHeadTile + lane * 2 + h] = sum;
            }
        }
    }
}

// Puts together what the warps have gathered of a part and shared. Runs in the consumers.
template <class Config>
CUTLASS_DEVICE void merge(
    KernelParams const& params, SharedStorage<Config>& shared, int64_t part, Gathered<Config> const& gathered, int thread) {
    Workspace const& workspace = params.workspace;
    int const heads = workspace.heads;
    int const head_dim = params.call.head_dim;
    int const warp = thread / kWarp;
    int const lane = thread % kWarp;
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
            if (warp == 0 && lane < 4 && head < heads) { store_kept(workspace.lse + part * heads + head, offset + log2f(sum)); }
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
            if (channel < head_dim && head < heads) {
                store_kept(workspace.out + (part * head_dim + channel) * heads + head, sum);
            }
            // Behind the last slice the next part's barrier does.
            if (tile < Config::kHeadTiles - 1 || slice < Config::kPlanes - 1) { sync_consumers<Config>(); }
        }
    }
}

// Attends to what is fetched. Runs in kConsumers warps.
template <class Config>
CUTLASS_DEVICE void consume(KernelParams const& params, SharedStorage<Config>& shared, int thread) {
    Workspace const& workspace = params.workspace;
    int const heads = workspace.heads;
    int const warp = thread / kWarp;
    int const lane = thread % kWarp;
    uint32_t fetched = 0;
    for_each_unit(shared, [&](Unit<Config> const& unit) {
        Part const part = unit.part;
        int const blocks = part.blocks;

        QueryOperands<Config> const query(unit);
        int64_t const pair = static_cast<int64_t>(part.row) * params.call.kv_heads + part.kv_head;
        float* const masses = workspace.masses + pair * workspace.words * kWordBlocks * heads;
        Gathered<Config> gathered;
        for (int i = warp; i < blocks; i += Config::kConsumers) {
            int const block = unit.list[i].block;
            int const keys = part.length - block * kDecodeBlock;
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
                part.tracked ? masses + static_cast<int64_t>(block) * heads : nullptr, heads);
            __syncwarp();
            if (lane == 0) { Barrier::arrive(&shared.stages.empty[stage]); }
        }
        fetched += blocks;

        leave(shared, unit);
        share(shared, gathered, warp);
        sync_consumers<Config>();
        merge(params, shared, pair * workspace.slots + part.chunk * kChunkSlots + part.number, gathered, thread);
    });
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 1) attend_kernel(__grid_constant__ KernelParams const params) {
    extern __shared__ __align__(1024) uint8_t memory[];
    auto& shared = *reinterpret_cast<SharedStorage<Config>*>(memory);
    // The next kernel waits where it needs what this one writes.
    cudaTriggerProgrammaticLaunchCompletion();
    if (threadIdx.x == blockDim.x - 1) {  // first threads look at the first rows meanwhile
        shared.units.init(kWarp, (Config::kConsumers + 1) * kWarp);
        shared.stages.init(1, 1);
        shared.turn = 1;  // the first part of a thread block is dealt out
        shared.backlog = 0;
        cutlass::arch::fence_barrier_init();
        cute::prefetch_tma_descriptor(&params.key);
        cute::prefetch_tma_descriptor(&params.value);
    }
    count_parts(params, shared.rows);
    number_units(shared.rows.first_unit(), params.call.rows);
    // Registers are given out to four warps at a time: to those who attend, as many as the others leave.
    static_assert(Config::kPlanners + 1 == 4 && Config::kConsumers == 8 && kFinders == 4);
    int const warp = threadIdx.x / kWarp;
    if (warp < 4) {
        cutlass::arch::warpgroup_reg_dealloc<Config::kOtherRegisters>();
        if (warp < Config::kPlanners) {
            plan(params, shared);
        } else {
            fetch(params, shared);
        }
    } else if (warp < 4 + Config::kConsumers) {
        cutlass::arch::warpgroup_reg_alloc<Config::kConsumerRegisters>();
        consume(params, shared, threadIdx.x - 4 * kWarp);
    } else {
        cutlass::arch::warpgroup_reg_dealloc<Config::kOtherRegisters>();
        find<Config>(params, shared.finders, warp - 4 - Config::kConsumers);
    }
    cudaGridDependencySynchronize();  // who waits for this kernel has waited for those before
}

}  // namespace lite_attention::sm90
