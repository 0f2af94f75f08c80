// Paged decode that visits only the key blocks that matter, and the summaries by which it decides.
// Exact meaning: lite_attention/reference.py (`decode`, `summarize`). Compiled once for each instruction set.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "params.h"
#include "vec.h"

namespace lite_attention::LITE_ISA {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kLog2Others = 3.9068905956085187f;  // log2(kBlock - 1)
constexpr int kScoreChunk = 128;  // blocks that a thread scores at a time
constexpr int kPart = 32;         // visited blocks that a thread attends to at a time
constexpr size_t kSmallWork = 1024;  // (block, query head) pairs that one thread computes before others wake up
constexpr int kHeadTile = 4;      // query heads of a group that share a load of K or V
constexpr int kRecent = 2;        // newest blocks, always visited
constexpr float kExpectedBend = 4, kGenerousBend = 8;  // of estimates, see lite_attention/reference.py

static_assert(kBlock == kLanes, "a block of scores is one vector");
static_assert(kBlock - 1 == 15);

// Call a function with the number of heads that share a load, as a constant.
template <typename F>
auto with_heads(int heads, F&& call) {
    switch (heads) {
        case 1: return call(std::integral_constant<int, 1>());
        case 2: return call(std::integral_constant<int, 2>());
        case 3: return call(std::integral_constant<int, 3>());
        default: return call(std::integral_constant<int, kHeadTile>());
    }
}

int ceil_div(int a, int b) { return (a + b - 1) / b; }

template <typename T>
const T* key_at(const KeyCache& key, int page, int token, int head) {
    return static_cast<const T*>(key.data) + page * key.page + token * key.token + head * key.head;
}

// One (row, KV head): what it must look at in this step.
struct Unit {
    int row, kv_head, tokens, blocks, visits, first_chunk, first_part;
    bool dense, all;   // dense: threshold is -inf, state untouched; all: visit all, rewrite the state
    int64_t base;      // into the scratch arrays indexed by block
};

// What summaries say of the scores of kCount blocks: the outlier's; the others' mean; the variance of the others'. Each is
// the sum of four numbers.
template <int kCount>
struct Moments {
    float outlier[4 * kCount], mean[4 * kCount], variance[4 * kCount];
};

template <typename T>
class Decode {
   public:
    explicit Decode(const DecodeParams& params)
        : p(params), group(p.heads / p.kv_heads), blocks_a_page(p.page_size / kBlock) {}

    void run() {
        plan_units();
        const bool worth_threads = block_sum.size() > kSmallWork;
        const int threads = worth_threads ? omp_get_max_threads() : 1;
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (int u = 0; u < int(units.size()); ++u) scale_queries(units[u]);
#pragma omp for schedule(dynamic)
            for (int c = 0; c < int(score_chunks.size()); ++c) estimate(score_chunks[c], c);
#pragma omp for schedule(static)
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
        int unit, begin, end;  // blocks (scores) or positions in the visit list (attention)
    };

    const DecodeParams& p;
    const int group, blocks_a_page;
    std::vector<Unit> units;
    std::vector<Span> score_chunks, parts;
    std::vector<float> queries;     // (units, group, head_dim), times scale * log2(e)
    std::vector<float> generous;    // (blocks, group) log2 of the mass that a block may have
    std::vector<float> chunk_mass;  // (score chunks, group) log2 of the mass that its blocks probably have
    std::vector<uint8_t> chosen;    // one flag a block
    std::vector<int> visit_list;    // numbers of the chosen blocks, ascending
    std::vector<float> block_sum;   // (visited blocks, group) sum of 2**(s - maximum of the part)
    std::vector<float> part_out;    // (parts, group, head_dim)
    std::vector<float> part_max, part_sum;  // (parts, group)

    void plan_units() {
        int64_t base = 0;
        for (int row = 0; row < p.rows; ++row) {
            const int tokens = std::max(p.seq_lens[row], 0), blocks = ceil_div(tokens, kBlock);
            const bool dense = p.thresholds[row] == -kInf;
            for (int h = 0; h < p.kv_heads; ++h) {
                const int first_chunk = int(score_chunks.size());
                units.push_back({row, h, tokens, blocks, 0, first_chunk, 0, dense, p.visit_all[row] != 0, base});
                for (int b = 0; b < blocks; b += kScoreChunk)
                    score_chunks.push_back({int(units.size()) - 1, b, std::min(b + kScoreChunk, blocks)});
                base += blocks;
            }
        }
        queries.resize(units.size() * group * p.head_dim);
        generous.resize(base * group);
        chunk_mass.resize(score_chunks.size() * group);
        chosen.resize(base);
        visit_list.resize(base);
        block_sum.resize(base * group);
    }

    int64_t queries_at(const Unit& u) const { return (&u - units.data()) * int64_t(group) * p.head_dim; }
    const float* queries_of(const Unit& u) const { return &queries[queries_at(u)]; }
    int page_of(const Unit& u, int block) const {
        return p.block_table[u.row * p.block_table_row + block / blocks_a_page];
    }
    uint32_t* mask_of(const Unit& u) const {
        return reinterpret_cast<uint32_t*>(p.mask) + p.slots[u.row] * p.mask_slot + u.kv_head * p.mask_head;
    }

    void scale_queries(const Unit& u) {
        float* out = &queries[queries_at(u)];
        for (int g = 0; g < group; ++g) {
            const T* q = static_cast<const T*>(p.query) + u.row * p.query_row + (u.kv_head * group + g) * p.query_head;
            for (int d = 0; d < p.head_dim; ++d) out[g * p.head_dim + d] = widen(q[d]) * (p.scale * kLog2E);
        }
    }

    // Blocks that are visited whatever they weigh.
    bool forced(const Unit& u, int block) const {
        return u.dense || u.all || block == 0 || block >= u.blocks - kRecent;
    }

    // A block is visited when it mattered at its last visit, or when its summary says it may matter now.
    void select(const Span& s) {
        const Unit& u = units[s.unit];
        std::vector<float> limit(group);
        if (!u.dense && !u.all)
            for (int g = 0; g < group; ++g) limit[g] = p.thresholds[u.row] + probable_mass(u, g);
        for (int b = s.begin; b < s.end; ++b) {
            bool visit = forced(u, b) || (mask_of(u)[b / 32] >> (b % 32) & 1u);
            const float* mass = &generous[(u.base + b) * group];
            for (int g = 0; g < group && !visit; ++g) visit = mass[g] > limit[g];
            chosen[u.base + b] = visit;
        }
    }

    // Log2 of the mass that all blocks together probably have.
    float probable_mass(const Unit& u, int head) const {
        const int end = u.first_chunk + ceil_div(u.blocks, kScoreChunk);
        float m = -kInf, total = 0;
        for (int c = u.first_chunk; c < end; ++c) m = std::max(m, chunk_mass[c * group + head]);
        for (int c = u.first_chunk; c < end; ++c) total += std::exp2(chunk_mass[c * group + head] - m);
        return m + std::log2(total);
    }

    // What blocks weigh: exactly where they are visited in any case, else by their summaries.
    void estimate(const Span& s, int chunk) {
        const Unit& u = units[s.unit];
        if (u.dense || u.all) return;
        for (int g = 0; g < group; g += kHeadTile)
            with_heads(group - g, [&](auto heads) { estimate<heads()>(u, s, chunk, g); });
    }

    template <int H>
    void estimate(const Unit& u, const Span& s, int chunk, int first) {
        Moments<kScoreChunk> m[H];
        const int count = s.end - s.begin;
        for (int b = 0; b < count; ++b) {
            if (forced(u, s.begin + b))
                exact_mass<H>(u, s.begin + b, first, m, b);
            else
                moments<H>(u, s.begin + b, first, m, b);
        }
        for (int h = 0; h < H; ++h)  // what does not exist weighs nothing
            for (int b = count; b % kLanes != 0; ++b) put_moments(m[h], b, Quarter{-kInf}, Quarter{-kInf}, Quarter{});
        for (int h = 0; h < H; ++h) {
            Vec outlier[kScoreChunk / kLanes], others[kScoreChunk / kLanes], largest = splat(-kInf), total = splat(0);
            const int vectors = ceil_div(count, kLanes);
            for (int i = 0; i < vectors; ++i) {
                const int place = 4 * i * kLanes;
                const Vec mean = sum_fours(m[h].mean + place) + kLog2Others, variance = sum_fours(m[h].variance + place);
                outlier[i] = sum_fours(m[h].outlier + place);
                others[i] = mean + spread(variance, kExpectedBend);
                largest = max(largest, max(outlier[i], others[i]));
                const Vec may = log2_of_sum(outlier[i], mean + spread(variance, kGenerousBend));
                for (int b = i * kLanes; b < std::min((i + 1) * kLanes, count); ++b)
                    generous[(u.base + s.begin + b) * group + first + h] = may[b - i * kLanes];
            }
            const float most = max(largest);
            for (int i = 0; i < vectors; ++i) total += exp2(outlier[i] - most) + exp2(others[i] - most);
            chunk_mass[chunk * group + first + h] = most + std::log2(sum(total));
        }
    }

    // How much the spread of a block's scores adds to the log2 of its mass; variance in squared log2 units.
    static Vec spread(Vec variance, float bend) {
        return (sqrt(variance * (1 / (kLog2E * kLog2E * bend)) + 1.0f) - 1.0f) * (bend * kLog2E);
    }

    // Of a block that is visited in any case: all of its mass, as if it were the others'.
    template <int H>
    void exact_mass(const Unit& u, int block, int first, Moments<kScoreChunk>* result, int place) const {
        Vec s[H];
        scores<H>(u, block, queries_of(u) + first * p.head_dim, s);
        for (int h = 0; h < H; ++h) {
            const float m = max(s[h]);
            const float mass = m + std::log2(sum(exp2(s[h] - m)));
            put_moments(result[h], place, Quarter{-kInf}, Quarter{mass - kLog2Others}, Quarter{});
        }
    }

    static void put_moments(Moments<kScoreChunk>& moments, int place, Quarter outlier, Quarter mean, Quarter variance) {
        std::memcpy(moments.outlier + 4 * place, &outlier, sizeof outlier);
        std::memcpy(moments.mean + 4 * place, &mean, sizeof mean);
        std::memcpy(moments.variance + 4 * place, &variance, sizeof variance);
    }

    // By its summary.
    template <int H>
    void moments(const Unit& u, int block, int first, Moments<kScoreChunk>* result, int place) const {
        const Summaries& s = p.summaries;
        const int D = p.head_dim;
        const uint8_t* summary = s.data + page_of(u, block) * s.page + u.kv_head * s.head +
                                 block % blocks_a_page * s.block;
        const uint16_t* words = reinterpret_cast<const uint16_t*>(summary);
        float scales[3];
        std::memcpy(scales, words + D, sizeof scales);
        const float* q = queries_of(u) + first * D;
        Vec outlier[H], mean[H], square[H];
        for (int h = 0; h < H; ++h) outlier[h] = mean[h] = square[h] = splat(0);
        for (int d = 0; d < D; d += kLanes) {
            const IVec word = load(words + d);
            const Vec o = signed_square((word >> 11) - 16), m = signed_square((word & 127) - 64);
            const Vec s = __builtin_convertvector(word >> 7 & 15, Vec);
            for (int h = 0; h < H; ++h) {
                const Vec qd = load(q + h * D + d), of_channel = qd * s;
                outlier[h] += qd * o;
                mean[h] += qd * m;
                square[h] += of_channel * of_channel;
            }
        }
        for (int h = 0; h < H; ++h)
            put_moments(result[h], place, fold(outlier[h]) * scales[0], fold(mean[h]) * scales[1],
                        fold(square[h]) * (scales[2] * scales[2]));
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
        for (int g = 0; g < group; g += kHeadTile)
            with_heads(group - g, [&](auto heads) { attend<heads()>(units[part.unit], part, index, g); });
    }

    template <int H>
    void attend(const Unit& u, const Span& part, int index, int first) {
        const int D = p.head_dim, count = part.end - part.begin;
        const int* blocks = &visit_list[u.base + part.begin];
        const float* q = queries_of(u) + first * D;
        Vec s[kPart][H], largest[H];
        for (int h = 0; h < H; ++h) largest[h] = splat(-kInf);
        for (int i = 0; i < count; ++i) {
            if (i + 1 < count) prefetch_keys(u, blocks[i + 1]);
            scores<H>(u, blocks[i], q, s[i]);
            for (int h = 0; h < H; ++h) largest[h] = max(largest[h], s[i][h]);
        }
        float part_largest[H], total[H];
        for (int h = 0; h < H; ++h) part_largest[h] = max(largest[h]), total[h] = 0;
        float* out = &part_out[(int64_t(index) * group + first) * D];
        std::fill(out, out + H * D, 0.0f);
        for (int i = 0; i < count; ++i) {
            if (i + 1 < count) prefetch_values(u, blocks[i + 1]);
            float weights[H][kBlock];
            for (int h = 0; h < H; ++h) {
                const Vec w = exp2(s[i][h] - part_largest[h]);
                store(weights[h], w);
                const float of_block = sum(w);
                block_sum[(u.base + part.begin + i) * group + first + h] = of_block;
                total[h] += of_block;
            }
            const int valid = std::min(kBlock, u.tokens - blocks[i] * kBlock);
            const T* value = value_of(u, blocks[i]);
            for (int d = 0; d < D; d += kLanes) {
                Vec acc[H];
                for (int h = 0; h < H; ++h) acc[h] = load(out + h * D + d);
                for (int t = 0; t < valid; ++t) {
                    const Vec v = load(value + t * p.value_token + d);
                    for (int h = 0; h < H; ++h) acc[h] += v * weights[h][t];
                }
                for (int h = 0; h < H; ++h) store(out + h * D + d, acc[h]);
            }
        }
        std::copy(part_largest, part_largest + H, &part_max[index * group + first]);
        std::copy(total, total + H, &part_sum[index * group + first]);
    }

    const T* key_of(const Unit& u, int block) const {
        return key_at<T>(p.key, page_of(u, block), block % blocks_a_page * kBlock, u.kv_head);
    }
    const T* value_of(const Unit& u, int block) const {
        return static_cast<const T*>(p.value) + page_of(u, block) * p.value_page +
               block % blocks_a_page * kBlock * p.value_token + u.kv_head * p.value_head;
    }

    // Visited blocks lie anywhere: the next one is asked for while this one is computed.
    void prefetch_keys(const Unit& u, int block) const {
        const T* key = key_of(u, block);
        const int64_t rows = p.key.token == 1 ? p.head_dim : kBlock;
        const int64_t stride = p.key.token == 1 ? p.key.dim : p.key.token;
        for (int64_t r = 0; r < rows; ++r) __builtin_prefetch(key + r * stride);
    }
    void prefetch_values(const Unit& u, int block) const {
        const T* value = value_of(u, block);
        for (int t = 0; t < kBlock; ++t)
            for (int d = 0; d < p.head_dim; d += int(64 / sizeof(T)))
                __builtin_prefetch(value + t * p.value_token + d);
    }

    // Scores of a block in log2 units, -inf past the end of the sequence.
    template <int H>
    void scores(const Unit& u, int block, const float* q, Vec* s) const {
        const int valid = std::min(kBlock, u.tokens - block * kBlock);
        const T* key = key_of(u, block);
        if (p.key.token == 1)
            scores_by_token<H>(q, key, s);
        else
            scores_by_channel<H>(q, key, valid, s);
        if (valid < kBlock) {
            const IVec outside = kLaneNumbers >= valid;
            for (int h = 0; h < H; ++h) s[h] = outside ? splat(-kInf) : s[h];
        }
    }

    // Keys stored channel by channel: 16 neighbouring tokens are one load.
    template <int H>
    void scores_by_token(const float* q, const T* key, Vec* s) const {
        for (int h = 0; h < H; ++h) s[h] = splat(0);
        const int D = p.head_dim;
        const int64_t stride = p.key.dim;
        for (int d = 0; d < D; ++d) {
            const Vec k = load(key + d * stride);
            for (int h = 0; h < H; ++h) s[h] += k * q[h * D + d];
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
        uint32_t* mask = mask_of(u);
        for (int i = 0; i < u.visits; ++i) {
            const int part = u.first_part + i / kPart;
            bool matters = false;
            for (int g = 0; g < group; ++g) {
                // The block's sum against threshold and LSE, both in units of 2**(maximum of the part).
                const float least = std::exp2(p.thresholds[u.row] + lse2[g] - part_max[part * group + g]);
                matters |= block_sum[(u.base + i) * group + g] > least;
            }
            const int block = visit_list[u.base + i];
            const uint32_t bit = 1u << (block % 32);
            mask[block / 32] = matters ? mask[block / 32] | bit : mask[block / 32] & ~bit;
        }
    }
};

// One part of a summary: its channels in whole numbers, and what these are times, so that a query along the part is scored right.
class Scale {
   public:
    explicit Scale(float step) : step(std::max(step, std::numeric_limits<float>::min())) {}

    int level(float x) {
        const int n = int(std::nearbyint(x / step));
        add(x, n);
        return n;
    }

    // The number n of which n |n| is nearest to x.
    int signed_root(float x) {
        const int n = int(std::nearbyint(std::sqrt(std::max(std::fabs(x) / step - 0.25f, 0.0f))));
        add(std::fabs(x), n * n);
        return x < 0 ? -n : n;
    }

    float value() const { return product > 0 ? float(square / product) : 0; }

   private:
    void add(double x, int times) {
        square += x * x;
        product += x * times;
    }

    float step;
    double square = 0, product = 0;
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
        const auto at = [&](int t, int d) { return widen(key[t * p.key.token + d * p.key.dim]); };
        std::vector<float> total(p.head_dim, 0.0f);
        float distance[kBlock] = {};
        for (int d = 0; d < p.head_dim; ++d) {
            for (int t = 0; t < kBlock; ++t) total[d] += at(t, d);
            for (int t = 0; t < kBlock; ++t) {
                const float off = at(t, d) - total[d] / kBlock;
                distance[t] += off * off;
            }
        }
        const int farthest = int(std::max_element(distance, distance + kBlock) - distance);
        std::vector<float> mean(p.head_dim), deviation(p.head_dim);
        float largest[3] = {0, 0, 0};
        for (int d = 0; d < p.head_dim; ++d) {
            float squares = 0;
            for (int t = 0; t < kBlock; ++t) mean[d] += t == farthest ? 0 : at(t, d);
            mean[d] /= kBlock - 1;
            for (int t = 0; t < kBlock; ++t) {
                const float off = t == farthest ? 0 : at(t, d) - mean[d];
                squares += off * off;
            }
            deviation[d] = std::sqrt(squares / (kBlock - 1));
            largest[0] = std::max(largest[0], std::fabs(at(farthest, d)));
            largest[1] = std::max(largest[1], std::fabs(mean[d]));
            largest[2] = std::max(largest[2], deviation[d]);
        }
        Scale outlier(largest[0] / (15 * 15)), others(largest[1] / (63 * 63)), spread(largest[2] / 15);
        for (int d = 0; d < p.head_dim; ++d) {
            const int word = (outlier.signed_root(at(farthest, d)) + 16) << 11 | spread.level(deviation[d]) << 7 |
                             (others.signed_root(mean[d]) + 64);
            reinterpret_cast<uint16_t*>(summary)[d] = uint16_t(word);
        }
        const float scales[3] = {outlier.value(), others.value(), spread.value()};
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
