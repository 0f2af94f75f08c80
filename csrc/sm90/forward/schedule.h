// SPDX-License-Identifier: MIT
// Which rows of the mask a thread block works on, which blocks of keys a row visits, and what becomes of the mask. One warp
// plans; every function here is called by its 32 lanes together.
#pragma once

#include "config.h"
#include "params.h"

namespace lite_attention::sm90 {

// What the kernel needs of ForwardParams beside the tensor maps.
struct RowParams {
    int32_t* mask;
    int64_t mask_batch_stride;
    int64_t mask_head_stride;
    int64_t mask_tile_stride;
    float const* thresholds;
    int32_t const* must_visit;
    int32_t const* must_skip;
    int* counter;
    int32_t const* order;  // numbers of rows as `locate` takes them; null where nothing is tracked: 0, 1, 2, ...
    int tokens_q;
    int tokens_k;
    int tile_queries;  // in a tile
    int tiles;  // of queries; of paired thread blocks: pairs of tiles
    int heads;
    int batch;
    int head_group;  // heads, of all batch rows, that are worked on at a time: their keys and values share the L2 cache
    bool causal;
};

// The row of the mask numbered `index`: tiles of the same heads are near each other, so that the heads' keys and values
// stay in the L2 cache; causal rows go from the longest to the shortest, which fills the gaps at the end.
CUTLASS_DEVICE void locate(RowParams const& params, int index, Work& work) {
    int const group_rows = params.tiles * params.head_group;
    int const group = index / group_rows;
    int const rest = index - group * group_rows;
    int const first_head = group * params.head_group;
    int const heads = min(params.head_group, params.heads * params.batch - first_head);
    int const tile = rest / heads;
    int const head = first_head + rest - tile * heads;
    work.batch = head / params.heads;
    work.head = head - work.batch * params.heads;
    work.tile = params.causal ? params.tiles - 1 - tile : tile;
}

// Blocks that some query before `end` attends: those before this number.
CUTLASS_DEVICE int reach(RowParams const& params, int end) {
    int tokens = params.tokens_k;
    if (params.causal) {
        tokens = max(0, min(tokens, min(end, params.tokens_q) + params.tokens_k - params.tokens_q));
    }
    return ceil_div(tokens, kBlockK);
}

// Walks all blocks that some query before the end of the tile, or of its pair of tiles, attends, from the last to the first.
template <int kCluster>
class DenseWalk {
  public:
    CUTLASS_DEVICE DenseWalk(RowParams const& params, Work const& work, int32_t*)
        : next_(reach(params, (work.tile / kCluster + 1) * kCluster * params.tile_queries)) {}
    CUTLASS_DEVICE int visits() const { return next_; }
    CUTLASS_DEVICE float threshold() const { return -INFINITY; }
    CUTLASS_DEVICE int32_t* words() const { return nullptr; }
    CUTLASS_DEVICE bool forced() const { return false; }
    CUTLASS_DEVICE int next() { return --next_; }
    CUTLASS_DEVICE void finish() {}

  private:
    int next_;
};

// Walks the blocks that a row of the mask visits, from the last to the first. On the way it rewrites the mask: what
// is visited becomes 0 until the Ledger says that it stays, but for what must be visited. `kSummaries`: in a tile, if those of
// blocks that are not visited are walked after that.
template <int kSummaries>
class MaskWalk {
    // The mask is read in chunks of a word a lane.
    static constexpr int kChunkBlocks = 32 * 32;
    static constexpr int kTileWords = kSummaries / 32;

  public:
    // `skipped`: words for notes of the row, which only this warp reads; null without summaries.
    CUTLASS_DEVICE MaskWalk(RowParams const& params, Work const& work, int32_t* skipped)
        : skipped_(skipped),
          words_(
              params.mask + work.batch * params.mask_batch_stride + work.head * params.mask_head_stride +
              work.tile * params.mask_tile_stride),
          must_visit_(params.must_visit),
          must_skip_(params.must_skip),
          blocks_(reach(params, (work.tile + 1) * params.tile_queries)),
          all_blocks_(ceil_div(params.tokens_k, kBlockK)),
          lane_(threadIdx.x % 32),
          threshold_(params.thresholds[work.batch]),
          dense_(threshold_ == -INFINITY) {
        chunk_ = ceil_div(all_blocks_, kChunkBlocks);
        if (dense_) {
            visits_ = blocks_;
            return;
        }
        int allowed = 0;
        uint32_t forced = 0;
        for (int chunk = chunk_ - 1; chunk >= 0; --chunk) {
            int const word = chunk * 32 + lane_;
            uint32_t const may = allowed_word(word);
            uint32_t const visited = (mask_word(word) | must_visit_word(word)) & may;
            allowed += __popc(may);
            visits_ += __popc(visited);
            forced |= visited & must_visit_word(word);
            if constexpr (kSummaries > 0) { summary_tiles_ += __popc(tiles_with(may & ~visited)); }
        }
        visits_ = __reduce_add_sync(~0u, visits_);
        if (visits_ == 0) {
            all_allowed_ = true;
            visits_ = __reduce_add_sync(~0u, allowed);
            summary_tiles_ = 0;
        }
        forced_ = __any_sync(~0u, forced != 0);
    }

    CUTLASS_DEVICE int visits() const { return visits_; }

    // Tiles in which a summary stands in for its block.
    CUTLASS_DEVICE int summary_tiles() const { return summary_tiles_; }

    // -inf: ordinary attention, which leaves the state as it is.
    CUTLASS_DEVICE float threshold() const { return threshold_; }

    // Null where the state stays as it is.
    CUTLASS_DEVICE int32_t* words() const { return dense_ ? nullptr : words_; }

    // Whether a block that must be visited stays, whatever the consumers say.
    CUTLASS_DEVICE bool forced() const { return forced_; }

    CUTLASS_DEVICE int next() {
        while (word_ == 0) {
            if (pending_ == 0) {
                load_chunk();
                continue;
            }
            place_ = 31 - __clz(pending_);
            pending_ ^= 1u << place_;
            word_ = __shfl_sync(~0u, chunk_words_, place_);
        }
        int const bit = 31 - __clz(word_);
        word_ ^= 1u << bit;
        return (chunk_ * 32 + place_) * 32 + bit;
    }

    // Rewrites the words that `next` has not come to.
    CUTLASS_DEVICE void finish() {
        while (chunk_ > 0) { load_chunk(); }
    }

    // After `finish`: calls `visit(tile)` for each SummaryTile.
    template <class Visit>
    CUTLASS_DEVICE void summaries(Visit visit) {
        for (int left = summary_tiles_; left > 0; ++chunk_) {
            uint32_t const skipped = skipped_word(chunk_ * 32 + lane_);
            for (uint32_t tiles = tiles_with(skipped); tiles != 0; tiles &= tiles - 1, --left) {
                int const place = __ffs(tiles) - 1;
                SummaryTile<kSummaries> tile;
                tile.block = (chunk_ * 32 + place) * 32;
                CUTLASS_PRAGMA_UNROLL
                for (int i = 0; i < kTileWords; ++i) { tile.stand_in.word[i] = __shfl_sync(~0u, skipped, place + i); }
                visit(tile);
            }
        }
    }

  private:
    // A bit for each tile of summaries in a chunk that has any of these blocks, at its first word's place.
    CUTLASS_DEVICE static uint32_t tiles_with(uint32_t blocks) {
        uint32_t const words = __ballot_sync(~0u, blocks != 0);
        return kTileWords == 2 ? (words | words >> 1) & 0x55555555 : words;
    }
    CUTLASS_DEVICE uint32_t skipped_word(int word) const {
        return word * 32 < all_blocks_ ? static_cast<uint32_t>(skipped_[word]) : 0u;
    }
    // Bits of the blocks below `blocks` in a word.
    CUTLASS_DEVICE static uint32_t below(int blocks, int word) {
        int const bits = blocks - word * 32;
        return bits >= 32 ? ~0u : bits <= 0 ? 0u : (1u << bits) - 1;
    }
    CUTLASS_DEVICE uint32_t mask_word(int word) const {
        return word * 32 < all_blocks_ ? static_cast<uint32_t>(__ldcg(words_ + word)) : 0u;
    }
    CUTLASS_DEVICE uint32_t must_visit_word(int word) const {
        return must_visit_ != nullptr && word * 32 < blocks_ ? static_cast<uint32_t>(must_visit_[word]) : 0u;
    }
    CUTLASS_DEVICE uint32_t allowed_word(int word) const {
        uint32_t const reach = below(blocks_, word);
        return must_skip_ != nullptr && reach != 0 ? reach & ~static_cast<uint32_t>(must_skip_[word]) : reach;
    }

    CUTLASS_DEVICE void load_chunk() {
        --chunk_;
        int const word = chunk_ * 32 + lane_;
        uint32_t const in_reach = below(blocks_, word);
        if (dense_) {
            chunk_words_ = in_reach;
        } else {
            uint32_t const before = mask_word(word);
            uint32_t const forced = must_visit_word(word);
            uint32_t const may = allowed_word(word);
            chunk_words_ = all_allowed_ ? may : (before | forced) & may;
            // Blocks past a causal row's reach keep their bits.
            uint32_t const exist = below(all_blocks_, word);
            uint32_t const stays = (chunk_words_ & forced) | (before & exist & ~in_reach);
            if (exist != 0) { words_[word] = static_cast<int32_t>(stays); }
            if (kSummaries > 0 && exist != 0) { skipped_[word] = static_cast<int32_t>(may & ~chunk_words_); }
        }
        pending_ = __ballot_sync(~0u, chunk_words_ != 0);
    }

    int32_t* skipped_;  // blocks that are allowed and not visited
    int32_t* words_;
    int32_t const* must_visit_;
    int32_t const* must_skip_;
    int blocks_;
    int all_blocks_;
    int lane_;
    float threshold_;
    int visits_ = 0;
    int summary_tiles_ = 0;
    int chunk_;
    int place_ = 0;
    uint32_t chunk_words_ = 0;
    uint32_t pending_ = 0;
    uint32_t word_ = 0;
    bool dense_;
    bool forced_ = false;
    bool all_allowed_ = false;
};

// Writes what becomes of the blocks, once the consumers have said which they want to keep. Runs in one lane.
template <class Config>
class Ledger {
    static constexpr int kBlocks = Config::kBlocks;

  public:
    CUTLASS_DEVICE void settle(StepOf<Config> const& step) {
        if (step.words == nullptr) { return; }
        static_assert(sizeof(step.keep) == 2 * sizeof(uint32_t));
        uint2 const halves = reinterpret_cast<uint2 const&>(step.keep);
        uint32_t kept = halves.x | halves.y;
        kept |= kept >> 16;
        kept |= kept >> 8;
        if (step.first) {
            first_block_ = step.visit.block[0];
            any_ = step.forced;
            if (Config::kTracking == Tracking::kRunningMax) { kept |= 1; }
        }
        CUTLASS_PRAGMA_UNROLL
        for (int b = 0; b < kBlocks; ++b) {
            if (step.visit.block[b] >= 0 && kept >> b & 1) { note(step.words, step.visit.block[b]); }
        }
        if constexpr (Config::kSummaries > 0) {
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < step.come_back.kWords; ++i) {
                uint32_t const bits = step.come_back.word[i];
                if (bits == 0) { continue; }
                atomicOr(step.words + step.summaries.block / 32 + i, static_cast<int>(bits));
                any_ = true;
            }
        }
        if (step.last) {
            if (!any_ && first_block_ >= 0) { note(step.words, first_block_); }
            flush(step.words);
        }
    }

  private:
    CUTLASS_DEVICE void note(int32_t* words, int block) {
        if (block / 32 != place_) {
            flush(words);
            place_ = block / 32;
        }
        bits_ |= 1u << block % 32;
        any_ = true;
    }
    CUTLASS_DEVICE void flush(int32_t* words) {
        if (bits_ != 0) { atomicOr(words + place_, static_cast<int>(bits_)); }
        bits_ = 0;
    }

    int place_ = 0;  // of the word that is being gathered
    uint32_t bits_ = 0;
    int first_block_ = -1;
    bool any_ = false;
};

// Numbers of rows, taken from a counter as thread blocks come to them, one ahead. The first of paired thread blocks takes those of
// both.
template <class Config>
class Counter {
    static constexpr int kCluster = Config::kCluster;

  public:
    CUTLASS_DEVICE Counter(int* counter, SharedStorage<Config>& shared) : counter_(counter), shared_(shared) {}

    CUTLASS_DEVICE int first() const { return blockIdx.x / kCluster; }

    // Before `next`, as early as can be.
    CUTLASS_DEVICE void take() {
        if (threadIdx.x % 32 != 0) { return; }
        if constexpr (!Config::kPaired) {
            taken_ = atomicAdd(counter_, 1);
        } else {
            int const place = shared_.taken.place(n_);
            CopyBarrier::arrive_and_expect_tx(&shared_.taken.full[place], sizeof(int));
            if (blockIdx.x % kCluster != 0) { return; }
            int const taken = atomicAdd(counter_, 1);
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < kCluster; ++i) {
                cute::store_shared_remote(
                    taken, cute::cast_smem_ptr_to_uint(&shared_.row[place]),
                    cute::cast_smem_ptr_to_uint(&shared_.taken.full[place]), i);
            }
        }
    }

    CUTLASS_DEVICE int next() {
        int const thread_blocks = gridDim.x / kCluster;
        if constexpr (!Config::kPaired) { return __shfl_sync(~0u, taken_, 0) + thread_blocks; }
        shared_.taken.wait_full(n_);
        return shared_.row[shared_.taken.place(n_++)] + thread_blocks;
    }

  private:
    int* counter_;
    SharedStorage<Config>& shared_;
    int taken_;
    uint32_t n_ = 0;
};

// Plans the thread block's rows, some steps ahead of those who fetch and compute them, and settles the steps of before.
// `skipped`: words (batch, heads, tiles, words of a row) for notes; null without summaries.
template <class Config>
CUTLASS_DEVICE void plan(RowParams const& params, int32_t* skipped, SharedStorage<Config>& shared) {
    constexpr bool kTracks = Config::kTracking != Tracking::kNone;
    using Walk = cute::conditional_t<kTracks, MaskWalk<Config::kSummaries>, DenseWalk<Config::kCluster>>;
    constexpr int kBlocks = Config::kBlocks;
    bool const leader = threadIdx.x % 32 == 0;
    int const rows = params.tiles * params.heads * params.batch;

    uint32_t n = 0;  // of the step
    Ledger<Config> ledger;
    auto next_place = [&]() -> StepOf<Config>& {
        shared.steps.wait_empty(n);
        StepOf<Config>& place = shared.step[shared.steps.place(n)];
        if (kTracks && leader) { ledger.settle(place); }
        return place;
    };
    auto publish = [&](StepOf<Config> const& step) {
        StepOf<Config>& place = next_place();
        if (leader) {
            place = step;
            cutlass::arch::ClusterBarrier::arrive(&shared.steps.full[shared.steps.place(n)]);
        }
        ++n;
    };

    if constexpr (kTracks && Config::kSummaries == 0) { cudaGridDependencySynchronize(); }  // rows are in order
    Counter<Config> counter(params.counter, shared);
    // Of a pair of causal tiles the thread blocks have the longer one in turns.
    int place_in_pair = blockIdx.x;
    for (int row = counter.first(); row < rows; row = counter.next(), ++place_in_pair) {
        counter.take();
        StepOf<Config> step{};
        locate(params, kTracks ? params.order[row] : row, step.work);
        step.work.tile = step.work.tile * Config::kCluster + place_in_pair % Config::kCluster;
        int32_t* notes = nullptr;
        if constexpr (Config::kSummaries > 0) {
            int64_t const head = static_cast<int64_t>(step.work.batch) * params.heads + step.work.head;
            notes = skipped + (head * params.tiles + step.work.tile) * ceil_div(ceil_div(params.tokens_k, kBlockK), 32);
        }
        Walk walk(params, step.work, notes);
        step.work.steps = max(1, ceil_div(walk.visits(), kBlocks));
        step.work.threshold = walk.threshold();
        step.words = walk.words();
        step.forced = walk.forced();
        // Tiles of one block less at the end, so that no product is of nothing. What is still missing then the first tile lacks, so that
        // only there something is hidden (but for causal rows).
        int const missing = step.work.steps * kBlocks - walk.visits();
        step.work.narrow_steps = min(missing, step.work.steps - 1);
        for (int i = 0; i < step.work.steps; ++i) {
            step.first = i == 0;
            step.last = i == step.work.steps - 1;
            int const blocks = i == 0 ? kBlocks - missing + step.work.narrow_steps
                                      : kBlocks - (i >= step.work.steps - step.work.narrow_steps);
            CUTLASS_PRAGMA_UNROLL
            for (int b = 0; b < kBlocks; ++b) { step.visit.block[b] = b < blocks ? walk.next() : -1; }
            if constexpr (Config::kSummaries > 0) {
                step.last = step.last && walk.summary_tiles() == 0;
                step.summary_tiles = walk.summary_tiles();
                step.summaries.block = -1;
            }
            publish(step);
        }
        walk.finish();
        if constexpr (Config::kSummaries > 0) {
            step.first = false;
            for (int& block : step.visit.block) { block = -1; }
            walk.summaries([&](SummaryTile<Config::kSummaries> const& summaries) {
                step.summaries = summaries;
                step.last = --step.summary_tiles == 0;
                publish(step);
            });
        }
    }
    StepOf<Config> end{};
    end.first = true;
    end.work.tile = -1;
    publish(end);
    if constexpr (kTracks) {
        for (int i = 1; i < kSteps; ++i, ++n) { next_place(); }
    }
}

}  // namespace lite_attention::sm90
