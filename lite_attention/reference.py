"""The operators in plain PyTorch: the specification that every implementation is compared with.

Slow on purpose: one query tile and one key block at a time, in the order in which a kernel visits them.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lite_attention.options import Rule, needs_lse
from lite_attention.ranges import pack_bits, unpack_bits
from lite_attention.tiles import BLOCK_K, DECODE_BLOCK, TILE_Q, WORD_BITS, ceil_div

LOG2_E = math.log2(math.e)
"""Scores are kept in log2 units: ``s = scale * LOG2_E * q·k``."""


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Type in which scores and sums are kept: float64 for float64 inputs, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class BlockSummaries(NamedTuple):
    """What `forward` knows of a key block that it skips: (batch, blocks, kv_heads, head_dim) each, type of the keys."""

    mean: Tensor
    """Of the block's keys."""
    variance: Tensor
    """Of the block's keys in each channel, around their mean."""
    value: Tensor
    """Mean of the block's values."""


def summarize_blocks(key: Tensor, value: Tensor) -> BlockSummaries:
    """Summaries of all key blocks; only real tokens count in the last one.

    Summed in float32 (float64 for float64), then rounded to the type of ``key``; a variance past its range is its
    largest number.

    Args:
        key, value: (batch, tokens_k, kv_heads, head_dim).
    """
    batch, tokens_k, kv_heads, head_dim = key.shape
    dtype = accumulation_dtype(key)
    summaries = BlockSummaries(*key.new_empty(3, batch, ceil_div(tokens_k, BLOCK_K), kv_heads, head_dim))
    for block, start in enumerate(range(0, tokens_k, BLOCK_K)):
        keys = key[:, start : start + BLOCK_K].to(dtype)
        mean = keys.mean(1)
        variance = (keys - mean[:, None]).square().mean(1)
        summaries.mean[:, block] = mean.to(key.dtype)
        summaries.variance[:, block] = variance.clamp(max=torch.finfo(key.dtype).max).to(key.dtype)
        summaries.value[:, block] = value[:, start : start + BLOCK_K].to(dtype).mean(1).to(value.dtype)
    return summaries


SUMMARY_BEND = 8.0
"""Bend of the spread with which a summary of `BLOCK_K` keys takes part in `forward`: see `spread`.

Half of it would weigh blocks that matter little somewhat better, but miss more of those that should come back.
"""


def spread(variance: Tensor, bend: float) -> Tensor:
    """How much heavier than keys at their mean a block's keys are, log2 units, for scores of this variance.

    The mass of n keys with score s is n times the mean of exp(s); its log is log n + mean(s) + var(s) / 2 + ..., the
    cumulants, of which Gaussian scores have no others. But n keys are finite: their mass is never more than that of
    the largest n times over, whose score grows as the deviation, not as the variance. So instead of v / 2 it is
    A (sqrt(1 + v / A) - 1), v / 2 for small v and sqrt(A v) for large.

    Args:
        variance: v, of scores in natural units.
        bend: A.
    """
    return bend * (torch.sqrt(1 + variance / bend) - 1) * LOG2_E


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    lse_state: Tensor | None,
    thresholds: Tensor | None,
    must_visit: Tensor | None,
    must_skip: Tensor | None,
    scale: float,
    causal: bool,
    rule: Rule,
    summaries: BlockSummaries | None = None,
    *,
    pairs_visited: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one step, visiting what ``mask`` says and clearing in it what the next step may skip.

    Each tile of ``TILE_Q`` queries visits its blocks of ``BLOCK_K`` keys from the last to the first: those
    with ``(mask or must_visit) and not must_skip``, or, where that leaves none, all but ``must_skip``. A
    visited block is cleared when every row of the tile that has a finite score in it agrees:

    - ``running_max``: max(s in block) - max(s in blocks visited before) <= threshold. The first block visited
      is never cleared.
    - ``mass``: log2(sum(2**s in block)) - LSE of the step before, in log2 units, <= threshold. Rows whose LSE
      is +inf (no step before) never agree. Where all blocks would go, the first one visited stays.
    - ``mass_summaries``: the same, and a block that is skipped stays in the softmax by its summary, and comes back by
      it. A row q with a = ``scale`` estimates the mass of a block of n keys, in natural units, as
      ``log n + a q·mean + A (sqrt(1 + v / A) - 1)``, where ``v = a**2 sum(q**2 variance)`` and A = `SUMMARY_BEND` (why:
      `spread`). With that mass and its mean value the block takes part, and its bit is set again unless every row
      agrees that the estimate, in place of the sum, is as small. Blocks of ``must_skip`` have no part in this.

    ``must_visit`` blocks are never cleared. A comparison with NaN is not agreement. With ``causal``, query i
    attends keys up to ``i + tokens_k - tokens_q``; blocks that no row of the tile attends are not visited and
    keep their bits.

    Args:
        query: (batch, tokens_q, heads, head_dim), any float type and strides.
        key: (batch, tokens_k, kv_heads, head_dim), type of ``query``; heads is a multiple of kv_heads.
        value: shape and type of ``key``.
        mask: int32 (batch, heads, tiles, words), 1 = visit, updated in place; bits past the last block are
            ignored and written 0. None: dense attention, and the four arguments after it are None.
        lse_state: float32 (batch, heads, tokens_q), natural log, +inf before the first step; read and updated
            in place by ``mass`` and ``mass_summaries``, ignored by ``running_max``.
        thresholds: float32 (batch,), log2 units. A row at -inf is dense: it visits every block, forced ranges
            or not, and leaves ``mask`` and ``lse_state`` as they are.
        must_visit: int32 (words,), blocks that every tile visits.
        must_skip: int32 (words,), blocks that no tile visits; stronger than ``must_visit``.
        scale: factor of q·k.
        causal: whether attention is causal, aligned at the last query and key; not with ``mass_summaries``.
        rule: when a block is cleared.
        summaries: as `summarize_blocks` gives them, which ``mass_summaries`` calls where this is None. Give those of
            the operator's inputs where these here are of a wider type.
        pairs_visited: int64 (), written: number of (tile, block) pairs that are visited, of all sequences and heads.
            Only beside ``mask``.

    Returns:
        Output, shape and type of ``query``, 0 for a query that attends no key; and LSE of the visited scores and of
        the estimates that took part, (batch, heads, tokens_q), natural log, -inf for such a query, float32 (float64 for
        float64 inputs).
    """
    dtype = accumulation_dtype(query)
    batch, tokens_q, heads, _ = query.shape
    tokens_k, kv_heads = key.shape[1:3]
    blocks = ceil_div(tokens_k, BLOCK_K)
    forced = unpack_bits(must_visit, blocks).tolist() if must_visit is not None else [False] * blocks
    forbidden = unpack_bits(must_skip, blocks).tolist() if must_skip is not None else [False] * blocks
    out = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.full((batch, heads, tokens_q), -math.inf, dtype=dtype, device=query.device)
    if rule == "mass_summaries" and mask is not None and summaries is None:
        summaries = summarize_blocks(key, value)
    pairs = 0

    for row in range(batch):
        threshold = float(thresholds[row]) if mask is not None and thresholds is not None else -math.inf
        for head in range(heads):
            kv_head = head * kv_heads // heads
            keys, values = key[row, :, kv_head].to(dtype), value[row, :, kv_head].to(dtype)
            for tile in range(ceil_div(tokens_q, TILE_Q)):
                queries = torch.arange(tile * TILE_Q, min((tile + 1) * TILE_Q, tokens_q), device=query.device)
                attended = queries + (tokens_k - tokens_q) if causal else torch.full_like(queries, tokens_k - 1)
                in_reach = range(ceil_div(max(int(attended[-1]) + 1, 0), BLOCK_K))
                bits = [True] * blocks
                visited = allowed = list(in_reach)
                if mask is not None and threshold > -math.inf:
                    bits = unpack_bits(mask[row, head, tile], blocks).tolist()
                    allowed = [block for block in in_reach if not forbidden[block]]
                    visited = [block for block in allowed if bits[block] or forced[block]] or allowed
                pairs += len(visited)

                # What takes part: scores and values of the keys of a visited block, or one of each for a summary.
                tile_query = query[row, queries, head].to(dtype) * (scale * LOG2_E)
                scores, part_values = {}, {}
                for block in visited:
                    positions = torch.arange(block * BLOCK_K, min((block + 1) * BLOCK_K, tokens_k), device=query.device)
                    hidden = positions > attended[:, None]
                    scores[block] = (tile_query @ keys[positions].T).masked_fill(hidden, -math.inf)
                    part_values[block] = values[positions]
                if rule == "mass_summaries" and summaries is not None:
                    for block in (block for block in allowed if block not in scores):
                        mean, variance, mean_value = (part[row, block, kv_head].to(dtype) for part in summaries)
                        log2_count = math.log2(min(BLOCK_K, tokens_k - block * BLOCK_K))
                        extra = spread(tile_query.square() @ variance / LOG2_E**2, SUMMARY_BEND)
                        scores[block] = (log2_count + tile_query @ mean + extra)[:, None]
                        part_values[block] = mean_value[None]
                if scores:
                    weights, lse[row, head, queries] = _softmax(torch.cat(list(scores.values()), dim=1))
                    out[row, queries, head] = (weights @ torch.cat(list(part_values.values()))).to(out.dtype)

                if mask is not None and threshold > -math.inf:
                    if needs_lse(rule):
                        assert lse_state is not None
                        kept = _kept_by_mass(scores, lse_state[row, head, queries] * LOG2_E, threshold)
                        lse_state[row, head, queries] = lse[row, head, queries].float()
                    else:
                        kept = _kept_by_running_max(scores, threshold)
                    kept |= {block for block in visited if forced[block]}
                    if visited and not kept:
                        kept = {visited[-1]}
                    for block in in_reach:
                        bits[block] = block in kept
                    mask[row, head, tile] = pack_bits(torch.tensor(bits, device=mask.device))
    if pairs_visited is not None:
        pairs_visited.fill_(pairs)
    return out, lse


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (rows, keys), 0 for a row without keys, and natural LSE (rows,) of scores in log2 units."""
    lse = torch.logsumexp(scores / LOG2_E, dim=1)
    weights = torch.exp(scores / LOG2_E - lse[:, None])
    return weights.masked_fill(lse[:, None] == -math.inf, 0.0), lse


def _kept_by_running_max(scores: dict[int, Tensor], threshold: float) -> set[int]:
    kept = set()
    running_max: Tensor | None = None
    for block in sorted(scores, reverse=True):
        block_max = scores[block].amax(dim=1)
        if running_max is None:
            kept.add(block)
            running_max = block_max
            continue
        agrees = (block_max - running_max <= threshold) | (block_max == -math.inf)
        if not agrees.all():
            kept.add(block)
        running_max = torch.maximum(running_max, block_max)
    return kept


def _kept_by_mass(scores: dict[int, Tensor], lse_before: Tensor, threshold: float) -> set[int]:
    kept = set()
    for block, block_scores in scores.items():
        block_mass = torch.logsumexp(block_scores / LOG2_E, dim=1) * LOG2_E
        agrees = (block_mass - lse_before <= threshold) & (lse_before != math.inf)
        agrees |= block_mass == -math.inf
        if not agrees.all():
            kept.add(block)
    return kept


def summarize(key_cache: Tensor, slot_mapping: Tensor, summaries: Tensor) -> None:
    """Write the summary of every block of the paged cache whose last token was written in this step.

    A summary keeps the block's outlier, the key that is farthest from their mean, and of the other keys the mean and
    the standard deviation: two bytes a channel, and a scale for each of the three. One key that a query looks for is
    what a mean hides best. Only whole blocks have a summary: `decode` always visits the newest two, so it never asks
    for that of an unfinished block.

    Outlier and mean are signed squares, n |n|, which are fine where channels are small: models have channels that are
    up to hundreds of times as large as the others. Their n are -15 to 15 and -63 to 63, the deviation 0 to 15.

    Args:
        key_cache: (pages, page_size, kv_heads, head_dim), any strides; page_size is a multiple of `DECODE_BLOCK`.
        slot_mapping: (tokens,) int64, position in the cache (page * page_size + offset) of each token
            written in this step; -1 is padding.
        summaries: (pages, kv_heads, page_size / DECODE_BLOCK, `summary_bytes`) uint8, updated in place: a word of 16
            bits a channel, mean + 64 in the lowest 7, deviation in the next 4, outlier + 16 in the highest 5; the
            scales of outlier, mean and deviation (float32 each), and four bytes that nobody reads.
    """
    head_dim = key_cache.shape[3]
    blocks_a_page = key_cache.shape[1] // DECODE_BLOCK
    for slot in slot_mapping.tolist():
        if slot < 0 or slot % DECODE_BLOCK != DECODE_BLOCK - 1:
            continue
        page, block = divmod(slot // DECODE_BLOCK, blocks_a_page)
        keys = key_cache[page, block * DECODE_BLOCK : (block + 1) * DECODE_BLOCK].float()
        farthest = (keys - keys.mean(0)).square().sum(-1).argmax(0)
        is_outlier = torch.arange(DECODE_BLOCK)[:, None, None] == farthest[:, None]
        outlier = keys.masked_fill(~is_outlier, 0).sum(0)
        mean = keys.masked_fill(is_outlier, 0).sum(0) / (DECODE_BLOCK - 1)
        squares = (keys - mean).square().masked_fill(is_outlier, 0).sum(0)
        deviation = (squares / (DECODE_BLOCK - 1)).sqrt()
        outliers, means = _signed_roots(outlier, 15), _signed_roots(mean, 63)
        deviations = (deviation / _step(deviation, 15)).round().int()
        words = outliers + 16 << 11 | deviations << 7 | means + 64
        scales = torch.stack(
            (
                _scale(outlier, outliers * outliers.abs()),
                _scale(mean, means * means.abs()),
                _scale(deviation, deviations),
            ),
            1,
        )
        row = summaries[page, :, block]
        row[:, : 2 * head_dim] = words.to(torch.int16).view(torch.uint8)
        row[:, 2 * head_dim : 2 * head_dim + 12] = scales.view(torch.uint8)


def _step(values: Tensor, largest: int) -> Tensor:
    """The step, (..., 1), of which the largest magnitude of values (..., head_dim) has so many."""
    return (values.abs().amax(-1, keepdim=True) / largest).clamp(min=torch.finfo(torch.float32).tiny)


def _signed_roots(values: Tensor, largest: int) -> Tensor:
    """Numbers n (int32), up to `largest`, such that n |n| is the nearest to the values, in steps."""
    squares = values.abs() / _step(values, largest**2)
    # Between two squares lies n^2 + n + 1/2 = (n + 1/2)^2 + 1/4.
    return ((squares - 0.25).clamp(min=0).sqrt().round() * values.sign()).int()


def _scale(values: Tensor, levels: Tensor) -> Tensor:
    """What levels (..., head_dim) are times, (...): such that a query along the values is scored right."""
    wide = values.double()
    products = (wide * levels).sum(-1)
    return torch.where(products > 0, wide.square().sum(-1) / products, 0).float()


def read_summaries(summaries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Outlier, mean and deviation, (..., head_dim) float32 each, of summaries (..., `summary_bytes`)."""
    words, scales, _ = summaries.split((summaries.shape[-1] - 16, 12, 4), -1)
    word = words.contiguous().view(torch.int16).int()
    outlier, mean, deviation = (word >> 11 & 31) - 16, (word & 127) - 64, word >> 7 & 15
    scale = scales.contiguous().view(torch.float32)
    return outlier * outlier.abs() * scale[..., :1], mean * mean.abs() * scale[..., 1:2], deviation * scale[..., 2:]


EXPECTED_BEND = 4.0
"""With it the estimates of Gaussian keys, scored with a deviation up to 4, are right on average, within 0.1 nats."""

GENEROUS_BEND = 8.0
"""Keys are not Gaussian: a block may hold the one key that a query looks for. Missing it costs more than reading it."""


def estimate(query: Tensor, summaries: Tensor, bend: float) -> Tensor:
    """Log2 of the mass of whole blocks: the outlier's, and the others' if Gaussian and independent in each channel.

    With a = softmax scale, n = `DECODE_BLOCK` - 1, A = bend and v = a^2 sum(q^2 deviation^2), in natural units the
    others have log(n) + a q.mean + A (sqrt(1 + v / A) - 1): see `spread`.

    Args:
        query: (heads, head_dim), times a * log2(e).
        summaries: (blocks, `summary_bytes`), see `summarize`.
        bend: A.

    Returns:
        (heads, blocks), in the dtype of the query.
    """
    outlier, mean, deviation = (part.to(query.dtype) for part in read_summaries(summaries))
    variance = query.square() @ deviation.square().T / LOG2_E**2
    others = math.log2(DECODE_BLOCK - 1) + query @ mean.T + spread(variance, bend)
    return torch.logaddexp2(query @ outlier.T, others)


def blocks_to_visit(query: Tensor, summaries: Tensor, mattered: Tensor, read: Tensor, threshold: float) -> Tensor:
    """Which blocks a KV head visits in a step that is not to visit all (see `decode`).

    Args:
        query: (group, head_dim), times softmax scale * log2(e).
        summaries: (blocks, `summary_bytes`).
        mattered: (blocks,) bool, the mask bits.
        read: (group,) log2 of the exact mass of the first block and the newest two.
        threshold: log2 of a share.

    Returns:
        (blocks,) bool.
    """
    others = summaries[1:-2]
    expected = torch.logsumexp(estimate(query, others, EXPECTED_BEND) * math.log(2), 1) * LOG2_E
    share = estimate(query, others, GENEROUS_BEND) - torch.logaddexp2(read, expected)[:, None]
    visit = mattered.clone()
    visit[1:-2] |= (share > threshold).any(0)
    visit[0] = True
    visit[-2:] = True
    return visit


def decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    summaries: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    slots: Tensor,
    thresholds: Tensor,
    visit_all: Tensor,
    mask: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One query token a sequence over a paged cache, visiting only the blocks that can matter.

    A KV head visits a block of `DECODE_BLOCK` keys when
    - it is the first block or one of the two newest, or the row's `visit_all` is set, or
    - its mask bit is set: at its last visit its share of a query head's softmax was above the threshold, or
    - its estimated share is above the threshold for a query head of the group: `estimate` with `GENEROUS_BEND`
      against the mass of all blocks, which is exact for those of the first line and else `estimate` with
      `EXPECTED_BEND`.

    Afterwards the bit of each visited block says whether its exact share (of the mass that was visited) is
    above the threshold for a query head of the group. With `visit_all` this rewrites the whole state, so the first
    step of a sequence must set it; so do refresh and warm-up steps.

    A row with threshold -inf is ordinary attention and leaves the state untouched; a row of length 0 gives
    zeros and LSE -inf.

    Args:
        query: (rows, heads, head_dim).
        key_cache, value_cache: (pages, page_size, kv_heads, head_dim), any strides, dtype of the query.
        summaries: see `summarize`.
        block_table: (rows, max_pages) int32, pages of each row's sequence.
        seq_lens: (rows,) int32, keys of each sequence, the newest included.
        slots: (rows,) int32, the row of the pooled state that a sequence holds; distinct for rows that skip.
        thresholds: (rows,) float32, log2 of a share.
        visit_all: (rows,) bool.
        mask: (slots, kv_heads, words) int32, updated in place.
        scale: softmax scale.

    Returns:
        out (rows, heads, head_dim), LSE (rows, heads) natural log float32, and the number of blocks visited,
        summed over KV heads, (rows,) int32.
    """
    rows, heads, head_dim = query.shape
    page_size, kv_heads = key_cache.shape[1], key_cache.shape[2]
    group = heads // kv_heads
    dtype = accumulation_dtype(query)
    out = torch.zeros(rows, heads, head_dim, dtype=query.dtype)
    lse = torch.full((rows, heads), -math.inf)
    visited = torch.zeros(rows, dtype=torch.int32)
    for row in range(rows):
        length, slot, threshold = int(seq_lens[row]), int(slots[row]), float(thresholds[row])
        if length <= 0:
            continue
        dense = threshold == -math.inf
        blocks = ceil_div(length, DECODE_BLOCK)
        pages = block_table[row, : ceil_div(length, page_size)].long()
        keys = key_cache[pages].flatten(0, 1)[:length].to(dtype)
        values = value_cache[pages].flatten(0, 1)[:length].to(dtype)
        summary = summaries[pages].transpose(1, 2).flatten(0, 1)[:blocks]
        for kv_head in range(kv_heads):
            group_heads = slice(kv_head * group, (kv_head + 1) * group)
            q = query[row, group_heads].to(dtype) * (scale * LOG2_E)
            visit = torch.ones(blocks, dtype=torch.bool)
            if not (dense or visit_all[row]):
                bits = unpack_bits(mask[slot, kv_head], blocks)
                newest = max(blocks - 2, 1) * DECODE_BLOCK
                read = torch.cat((keys[:DECODE_BLOCK, kv_head], keys[newest:, kv_head]))
                mass = torch.logsumexp(q @ read.T * math.log(2), 1) * LOG2_E
                visit = blocks_to_visit(q, summary[:, kv_head], bits, mass, threshold)
            chosen = visit.nonzero().flatten()
            visited[row] += len(chosen)
            tokens = (chosen[:, None] * DECODE_BLOCK + torch.arange(DECODE_BLOCK)).flatten()
            tokens = tokens[tokens < length]
            scores = q @ keys[tokens, kv_head].T
            lse2 = torch.logsumexp(scores * math.log(2), -1) * LOG2_E
            out[row, group_heads] = (torch.exp2(scores - lse2[:, None]) @ values[tokens, kv_head]).to(out.dtype)
            lse[row, group_heads] = (lse2 * math.log(2)).float()
            if dense:
                continue
            bits = unpack_bits(mask[slot, kv_head], mask.shape[2] * WORD_BITS)
            for block in chosen.tolist():
                of_block = scores[:, tokens // DECODE_BLOCK == block]
                mass = torch.logsumexp(of_block * math.log(2), -1) * LOG2_E
                bits[block] = bool((mass - lse2 > threshold).any())
            mask[slot, kv_head] = pack_bits(bits)
    return out, lse, visited
