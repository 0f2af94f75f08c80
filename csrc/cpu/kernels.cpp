// Paged decode that visits only the key blocks that matter, and the summaries by which it decides.
// Exact meaning: lite_attention/reference.py (`decode`, `summarize`). Compiled once for each instruction set.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "params.h"
#include "vec.h"

namespace lite_attention::LITE_ISA {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr int kScoreChunk = 128;  // blocks that a thread scores at a time
constexpr int kPart = 32;         // visited blocks that a thread attends to at a time
constexpr int kHeadTile = 4;      // query heads of a group that share a load of K or V
constexpr int kRecent = 2;        // newest blocks, always visited

static_assert(kBlock == kLanes, "a block of scores is one vector");

int ceil_div(int a, int b) { return (a + b - 1) / b; }

template <typename T>
const T* key_at(const KeyCache& key, int page, int token, int head) {
    return static_cast<const T*>(key.data) + page * key.page + token * key.token + head * key.head;
}

// One (row, KV head): what it must look at in this step.
struct Unit {
    int row, kv_head, tokens, blocks, visits, first_part;
    bool dense, all;   // dense: threshold is -inf, state untouched; all: visit all, rewrite the state
    int64_t base;      // into the scratch arrays indexed by block
};

template <typename T>
class Decode {
   public:
    explicit Decode(const DecodeParams& params) : p(params), group(p.heads / p.kv_heads) {}

    void run() {
        plan_units();
        const int threads = omp_get_max_threads();
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (int u = 0; u < int(units.size()); ++u) scale_queries(units[u]);
#pragma omp for schedule(dynamic)
            for (int c = 0; c < int(score_chunks.size()); ++c) select(score_chunks[c]);
#pragma omp single
            plan_parts();
#pragma omp for schedule(dynamic)
            for (int i = 0; i < int(parts.size()); ++i) attend(parts[i], i);
#pragma omp for schedule(static)
            for (int u = 0; u < int(units.size()); ++u) finish(units[u]);
        }
        for (int r = 0; r < p.rows; ++r) p.visited[r] = 0;
        for (const Unit& u : units) p.visited[u.row] += u.visits;
    }

   private:
    struct Span {
        int unit, begin, end;  // blocks (selection) or positions in the visit list (attention)
    };

    const DecodeParams& p;
    const int group;
    std::vector<Unit> units;
    std::vector<Span> score_chunks, parts;
    std::vector<float> queries;     // (units, group, head_dim), times scale * log2(e)
    std::vector<uint8_t> chosen;    // one flag a block
    std::vector<int> visit_list;    // numbers of the chosen blocks, ascending
    std::vector<float> block_mass;  // (visited blocks, group) log2 of the block's sum of 2**s
    std::vector<float> part_out;    // (parts, group, head_dim)
    std::vector<float> part_max, part_sum;  // (parts, group)

    void plan_units() {
        int64_t base = 0;
        for (int row = 0; row < p.rows; ++row) {
            const int tokens = std::max(p.seq_lens[row], 0), blocks = ceil_div(tokens, kBlock);
            const bool dense = p.thresholds[row] == -kInf;
            for (int h = 0; h < p.kv_heads; ++h) {
                units.push_back({row, h, tokens, blocks, 0, 0, dense, p.visit_all[row] != 0, base});
                for (int b = 0; b < blocks; b += kScoreChunk)
                    score_chunks.push_back({int(units.size()) - 1, b, std::min(b + kScoreChunk, blocks)});
                base += blocks;
            }
        }
        queries.resize(units.size() * group * p.head_dim);
        chosen.resize(base);
        visit_list.resize(base);
        block_mass.resize(base * group);
    }

    float* queries_of(const Unit& u) { return &queries[int64_t(&u - units.data()) * group * p.head_dim]; }
    int page_of(const Unit& u, int block) const {
        return p.block_table[u.row * p.block_table_row + block * kBlock / p.page_size];
    }
    uint32_t* mask_of(const Unit& u) const {
        return reinterpret_cast<uint32_t*>(p.mask) + p.slots[u.row] * p.mask_slot + u.kv_head * p.mask_head;
    }
    float* lse_of(const Unit& u) const { return p.lse_state + p.slots[u.row] * p.lse_slot + u.kv_head * group; }

    void scale_queries(const Unit& u) {
        float* out = queries_of(u);
        for (int g = 0; g < group; ++g) {
            const T* q = static_cast<const T*>(p.query) + u.row * p.query_row + (u.kv_head * group + g) * p.query_head;
            for (int d = 0; d < p.head_dim; ++d) out[g * p.head_dim + d] = widen(q[d]) * (p.scale * kLog2E);
        }
    }

    // A block is visited when it mattered at its last visit, or when its summary says it may matter now.
    void select(const Span& s) {
        const Unit& u = units[s.unit];
        for (int b = s.begin; b < s.end; ++b) {
            const bool forced = u.dense || u.all || b == 0 || b >= u.blocks - kRecent;
            chosen[u.base + b] = forced || (mask_of(u)[b / 32] >> (b % 32) & 1u) || may_matter(u, b);
        }
    }

    // Whether Gaussian keys with the block's mean and deviation would have more than the threshold's share.
    bool may_matter(const Unit& u, int block) {
        const Summaries& s = p.summaries;
        const int page = page_of(u, block), inner = block % (p.page_size / kBlock);
        const uint8_t* summary = s.data + page * s.page + u.kv_head * s.head + inner * s.block;
        const int8_t* mean = reinterpret_cast<const int8_t*>(summary);
        const uint8_t* deviation = summary + p.head_dim;
        float scales[2];
        std::memcpy(scales, summary + 2 * p.head_dim, sizeof scales);
        const float threshold = p.thresholds[u.row];
        for (int g = 0; g < group; ++g) {
            const float* q = queries_of(u) + g * p.head_dim;
            Vec linear = splat(0), square = splat(0);
            for (int d = 0; d < p.head_dim; d += kLanes) {
                const Vec qd = load(q + d);
                linear += qd * load(mean + d);
                const Vec spread = qd * load(deviation + d);
                square += spread * spread;
            }
            const Vec terms = linear * scales[0] + square * (scales[1] * scales[1] * 0.5f * kLn2);
            const float mass = std::log2(float(kBlock)) + sum(terms);
            if (mass - lse_of(u)[g] * kLog2E > threshold) return true;
        }
        return false;
    }

    void plan_parts() {
        for (int i = 0; i < int(units.size()); ++i) {
            Unit& u = units[i];
            for (int b = 0; b < u.blocks; ++b)
                if (chosen[u.base + b]) visit_list[u.base + u.visits++] = b;
            u.first_part = int(parts.size());
            for (int v = 0; v < u.visits; v += kPart) parts.push_back({i, v, std::min(v + kPart, u.visits)});
        }
        part_out.resize(parts.size() * group * p.head_dim);
        part_max.resize(parts.size() * group);
        part_sum.resize(parts.size() * group);
    }

    void attend(const Span& part, int index) {
        const Unit& u = units[part.unit];
        for (int g = 0; g < group; g += kHeadTile) {
            switch (std::min(kHeadTile, group - g)) {
                case 1: attend_heads<1>(u, part, index, g); break;
                case 2: attend_heads<2>(u, part, index, g); break;
                case 3: attend_heads<3>(u, part, index, g); break;
                default: attend_heads<kHeadTile>(u, part, index, g);
            }
        }
    }

    template <int H>
    void attend_heads(const Unit& u, const Span& part, int index, int first) {
        const int D = p.head_dim;
        const float* q = queries_of(u) + first * D;
        float* out = &part_out[(int64_t(index) * group + first) * D];
        std::fill(out, out + H * D, 0.0f);
        float running_max[H], running_sum[H];
        std::fill(running_max, running_max + H, -kInf);
        std::fill(running_sum, running_sum + H, 0.0f);
        for (int i = part.begin; i < part.end; ++i) {
            const int block = visit_list[u.base + i], page = page_of(u, block);
            const int token = block * kBlock % p.page_size;
            const int valid = std::min(kBlock, u.tokens - block * kBlock);
            Vec s[H];
            if (p.key.token == 1)
                scores_by_token<H>(q, key_at<T>(p.key, page, token, u.kv_head), s);
            else
                scores_by_channel<H>(q, key_at<T>(p.key, page, token, u.kv_head), valid, s);
            float weights[H][kBlock], rescale[H];
            for (int h = 0; h < H; ++h) {
                for (int t = valid; t < kBlock; ++t) s[h][t] = -kInf;
                const float block_max = max(s[h]), new_max = std::max(running_max[h], block_max);
                const Vec w = exp2(s[h] - new_max);
                const float block_sum = sum(w);
                block_mass[(u.base + i) * group + first + h] = new_max + std::log2(block_sum);
                rescale[h] = std::exp2(running_max[h] - new_max);
                running_sum[h] = running_sum[h] * rescale[h] + block_sum;
                running_max[h] = new_max;
                store(weights[h], w);
            }
            const T* value = static_cast<const T*>(p.value) + page * p.value_page + token * p.value_token +
                             u.kv_head * p.value_head;
            for (int d = 0; d < D; d += kLanes) {
                Vec acc[H];
                for (int h = 0; h < H; ++h) acc[h] = load(out + h * D + d) * rescale[h];
                for (int t = 0; t < valid; ++t) {
                    const Vec v = load(value + t * p.value_token + d);
                    for (int h = 0; h < H; ++h) acc[h] += v * weights[h][t];
                }
                for (int h = 0; h < H; ++h) store(out + h * D + d, acc[h]);
            }
        }
        std::copy(running_max, running_max + H, &part_max[index * group + first]);
        std::copy(running_sum, running_sum + H, &part_sum[index * group + first]);
    }

    // Keys stored channel by channel: 16 neighbouring tokens are one load.
    template <int H>
    void scores_by_token(const float* q, const T* key, Vec* s) const {
        for (int h = 0; h < H; ++h) s[h] = splat(0);
        for (int d = 0; d < p.head_dim; ++d) {
            const Vec k = load(key + d * p.key.dim);
            for (int h = 0; h < H; ++h) s[h] += k * q[h * p.head_dim + d];
        }
    }

    // Keys stored token by token.
    template <int H>
    void scores_by_channel(const float* q, const T* key, int valid, Vec* s) const {
        for (int t = 0; t < valid; ++t) {
            Vec acc[H];
            for (int h = 0; h < H; ++h) acc[h] = splat(0);
            for (int d = 0; d < p.head_dim; d += kLanes) {
                const Vec k = load(key + t * p.key.token + d);
                for (int h = 0; h < H; ++h) acc[h] += k * load(q + h * p.head_dim + d);
            }
            for (int h = 0; h < H; ++h) s[h][t] = sum(acc[h]);
        }
    }

    // Join the parts of a unit, write the outputs, and note which blocks mattered.
    void finish(const Unit& u) {
        const int D = p.head_dim, parts_end = u.first_part + ceil_div(u.visits, kPart);
        std::vector<float> lse2(group, -kInf);
        for (int g = 0; g < group; ++g) {
            float m = -kInf, total = 0;
            for (int i = u.first_part; i < parts_end; ++i) m = std::max(m, part_max[i * group + g]);
            std::vector<float> acc(D, 0.0f);
            for (int i = u.first_part; i < parts_end; ++i) {
                const float weight = std::exp2(part_max[i * group + g] - m);
                total += part_sum[i * group + g] * weight;
                const float* part = &part_out[(int64_t(i) * group + g) * D];
                for (int d = 0; d < D; ++d) acc[d] += part[d] * weight;
            }
            const int head = u.kv_head * group + g;
            T* out = static_cast<T*>(p.out) + (int64_t(u.row) * p.heads + head) * D;
            for (int d = 0; d < D; ++d) put(out + d, total > 0 ? acc[d] / total : 0.0f);
            lse2[g] = total > 0 ? m + std::log2(total) : -kInf;
            p.lse[int64_t(u.row) * p.heads + head] = lse2[g] * kLn2;
        }
        if (u.dense || u.blocks == 0) return;
        std::copy_n(&p.lse[int64_t(u.row) * p.heads + u.kv_head * group], group, lse_of(u));
        uint32_t* mask = mask_of(u);
        for (int i = 0; i < u.visits; ++i) {
            bool matters = false;
            for (int g = 0; g < group; ++g)
                matters |= block_mass[(u.base + i) * group + g] - lse2[g] > p.thresholds[u.row];
            const int block = visit_list[u.base + i];
            const uint32_t bit = 1u << (block % 32);
            mask[block / 32] = matters ? mask[block / 32] | bit : mask[block / 32] & ~bit;
        }
    }
};

template <typename T>
void summarize_blocks(const SummarizeParams& p) {
    std::vector<int64_t> blocks;  // number of each block whose last token was written now
    for (int64_t t = 0; t < p.tokens; ++t)
        if (p.slot_mapping[t] >= 0 && p.slot_mapping[t] % kBlock == kBlock - 1)
            blocks.push_back(p.slot_mapping[t] / kBlock);
    const int blocks_a_page = p.page_size / kBlock;
    const int64_t work = int64_t(blocks.size()) * p.kv_heads;
#pragma omp parallel for schedule(static) if (work > 64)
    for (int64_t i = 0; i < work; ++i) {
        const int64_t block = blocks[i / p.kv_heads], page = block / blocks_a_page, inner = block % blocks_a_page;
        const int head = int(i % p.kv_heads);
        const T* key = key_at<T>(p.key, int(page), int(inner) * kBlock, head);
        const Summaries& s = p.summaries;
        uint8_t* summary = s.data + page * s.page + head * s.head + inner * s.block;
        std::vector<float> mean(p.head_dim), deviation(p.head_dim);
        float scales[2] = {0, 0};
        for (int d = 0; d < p.head_dim; ++d) {
            float total = 0, squares = 0;
            for (int t = 0; t < kBlock; ++t) total += widen(key[t * p.key.token + d * p.key.dim]);
            mean[d] = total / kBlock;
            for (int t = 0; t < kBlock; ++t) {
                const float off = widen(key[t * p.key.token + d * p.key.dim]) - mean[d];
                squares += off * off;
            }
            deviation[d] = std::sqrt(squares / kBlock);
            scales[0] = std::max(scales[0], std::fabs(mean[d]) / 127);
            scales[1] = std::max(scales[1], deviation[d] / 255);
        }
        constexpr float kTiny = std::numeric_limits<float>::min();
        const float mean_step = std::max(scales[0], kTiny), deviation_step = std::max(scales[1], kTiny);
        for (int d = 0; d < p.head_dim; ++d) {
            summary[d] = uint8_t(int8_t(std::nearbyint(mean[d] / mean_step)));
            summary[p.head_dim + d] = uint8_t(std::nearbyint(deviation[d] / deviation_step));
        }
        std::memcpy(summary + 2 * p.head_dim, scales, sizeof scales);
    }
}

}  // namespace

void decode(const DecodeParams& p) {
    switch (p.dtype) {
        case kFloat32: Decode<float>(p).run(); break;
        case kBFloat16: Decode<bfloat16>(p).run(); break;
        case kFloat16: Decode<float16>(p).run(); break;
    }
}

void summarize(const SummarizeParams& p) {
    switch (p.dtype) {
        case kFloat32: summarize_blocks<float>(p); break;
        case kBFloat16: summarize_blocks<bfloat16>(p); break;
        case kFloat16: summarize_blocks<float16>(p); break;
    }
}

}  // namespace lite_attention::LITE_ISA
