"""`lite_attention::forward` on CPU: reads and multiplies only the key blocks that are visited."""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from lite_attention.options import Rule, needs_lse
from lite_attention.ranges import pack_bits, unpack_bits
from lite_attention.reference import LOG2_E, SUMMARY_BEND, spread, summarize_blocks
from lite_attention.tiles import BLOCK_K, TILE_Q, ceil_div


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
    *,
    pairs_visited: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments, results and meaning as `lite_attention.reference.forward`; float32, bfloat16 and float16."""
    batch, tokens_q, heads, _ = query.shape
    tokens_k, kv_heads = key.shape[1:3]
    blocks = ceil_div(tokens_k, BLOCK_K)
    nothing = torch.zeros(blocks, dtype=torch.bool, device=query.device)
    forced = nothing if must_visit is None else unpack_bits(must_visit, blocks)
    allowed = ~nothing if must_skip is None else ~unpack_bits(must_skip, blocks)
    positions = torch.arange(max(tokens_q, blocks * BLOCK_K), device=query.device)
    summaries = summarize_blocks(key, value) if mask is not None and rule == "mass_summaries" else None
    n_allowed = int(allowed.sum())
    log2_counts = (tokens_k - positions[: blocks * BLOCK_K : BLOCK_K]).clamp(max=BLOCK_K).log2()
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = torch.empty((batch, heads, tokens_q), dtype=torch.float32, device=query.device)
    pairs = 0

    for row in range(batch):
        threshold = -math.inf if thresholds is None else float(thresholds[row])
        for head in range(heads):
            if head % (heads // kv_heads) == 0:
                kv_head = head * kv_heads // heads
                key_blocks = _as_blocks(key[row, :, kv_head], blocks)
                value_blocks = _as_blocks(value[row, :, kv_head], blocks)
            head_mask = mask[row, head] if mask is not None and threshold > -math.inf else None
            bits = None if head_mask is None else unpack_bits(head_mask, blocks)
            for tile, start in enumerate(range(0, tokens_q, TILE_Q)):
                rows = slice(start, min(start + TILE_Q, tokens_q))
                attended = positions[rows] + (tokens_k - tokens_q)
                if not causal:
                    attended = torch.full_like(attended, tokens_k - 1)
                reach = ceil_div(max(int(attended[-1]) + 1, 0), BLOCK_K)
                if bits is None:
                    visited = positions[:reach]
                else:
                    visited = _blocks_to_visit(bits[tile, :reach], forced[:reach], allowed[:reach])
                pairs += len(visited)

                queries = query[row, rows, head].float() * (scale * LOG2_E)
                tile_out, lse2, block_max, block_mass = _attend(
                    queries, _gather(key_blocks, visited), _gather(value_blocks, visited), visited, attended
                )
                judged = visited
                if bits is not None and summaries is not None and len(visited) < n_allowed:
                    skipped = allowed.clone()
                    skipped[visited] = False
                    stand_ins = skipped.nonzero().squeeze(1)
                    mean, variance, mean_value = (part[row, stand_ins, kv_head].float() for part in summaries)
                    estimates = log2_counts[stand_ins] + _estimate(queries, mean, variance)
                    tile_out, lse2 = _add_stand_ins(tile_out, lse2, estimates, mean_value)
                    # Behind them the blocks visited: the last is the first one visited, which stays where all would go.
                    judged = torch.cat((stand_ins, visited))
                    block_mass = torch.cat((estimates, block_mass), 1)
                out[row, rows, head] = tile_out
                lse[row, head, rows] = lse2 / LOG2_E

                if bits is not None:
                    if needs_lse(rule):
                        assert lse_state is not None
                        kept = _kept_by_mass(block_mass, lse_state[row, head, rows] * LOG2_E, threshold)
                        lse_state[row, head, rows] = lse[row, head, rows]
                    else:
                        kept = _kept_by_running_max(block_max, threshold)
                    kept |= forced[judged]
                    if not kept.any():
                        kept[-1:] = True
                    bits[tile, :reach] = False
                    bits[tile, judged] = kept
            if head_mask is not None and bits is not None:
                head_mask.copy_(pack_bits(bits))
    if pairs_visited is not None:
        pairs_visited.fill_(pairs)
    return out, lse


def _as_blocks(tokens: Tensor, blocks: int) -> Tensor:
    """(tokens, head_dim) as contiguous float32 (blocks, BLOCK_K, head_dim), filled up with zeros."""
    padded = pad(tokens.float(), (0, 0, 0, blocks * BLOCK_K - tokens.shape[0]))
    return padded.contiguous().unflatten(0, (blocks, BLOCK_K))


def _blocks_to_visit(bits: Tensor, forced: Tensor, allowed: Tensor) -> Tensor:
    """Ascending numbers of the blocks that a tile visits, from bool (blocks,) each."""
    visited = (bits | forced) & allowed
    return (visited if visited.any() else allowed).nonzero().squeeze(1)


def _gather(blocks: Tensor, visited: Tensor) -> Tensor:
    """Visited blocks below each other: (visited * BLOCK_K, head_dim); a view where a tile visits all."""
    return (blocks if len(visited) == len(blocks) else blocks[visited]).flatten(0, 1)


def _attend(
    queries: Tensor, keys: Tensor, values: Tensor, visited: Tensor, attended: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Softmax over the visited blocks of one tile; the last key of each query is ``attended`` (rows,).

    Returns:
        Output (rows, head_dim), LSE (rows,), and largest score and mass of each block (rows, visited); the
        last three in log2 units.
    """
    scores = (queries @ keys.T).unflatten(1, (len(visited), BLOCK_K))
    whole = int((visited < (attended[0] + 1) // BLOCK_K).sum())
    positions = visited[whole:, None] * BLOCK_K + torch.arange(BLOCK_K, device=queries.device)
    scores[:, whole:].masked_fill_(positions > attended[:, None, None], -math.inf)
    if len(visited) == 0:
        nothing = scores.sum(2)
        return torch.zeros_like(queries), torch.full((len(queries),), -math.inf), nothing, nothing

    # Each block is summed below its own maximum, so that its mass is exact however small its share is.
    block_max = scores.amax(2)
    base = block_max.clamp(min=torch.finfo(scores.dtype).min)
    weights = scores.sub_(base[:, :, None]).exp2_()
    block_sum = weights.sum(2)
    row_base = base.amax(1, keepdim=True)
    factor = (base - row_base).exp2_()
    total = (block_sum * factor).sum(1)
    weights.mul_(factor[:, :, None])
    # A row that attends any key has a total of 1 or more.
    out = (weights.flatten(1) @ values) / total.clamp(min=1.0)[:, None]
    return out, row_base[:, 0] + total.log2(), block_max, base + block_sum.log2()


def _estimate(queries: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Log2 of the mean weight of a block's keys, (rows, blocks), from (rows, head_dim) and (blocks, head_dim) each."""
    return queries @ mean.T + spread(queries.square() @ variance.T / LOG2_E**2, SUMMARY_BEND)


def _add_stand_ins(out: Tensor, lse2: Tensor, estimates: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Output (rows, head_dim) and LSE (rows,), log2 units, with blocks of these masses, (rows, blocks), and values."""
    estimated = torch.logsumexp(estimates / LOG2_E, 1) * LOG2_E
    total = torch.logaddexp2(lse2, estimated)
    return out * (lse2 - total).exp2()[:, None] + (estimates - total[:, None]).exp2() @ values, total


def _kept_by_running_max(block_max: Tensor, threshold: float) -> Tensor:
    """Blocks, bool (visited,), that the rule ``running_max`` keeps, from (rows, visited) in log2 units."""
    running_max = block_max.flip(1).cummax(1).values.flip(1)
    agrees = block_max[:, :-1] - running_max[:, 1:] <= threshold
    agrees |= block_max[:, :-1] == -math.inf
    return pad(~agrees.all(0), (0, min(block_max.shape[1], 1)), value=True)


def _kept_by_mass(block_mass: Tensor, lse_before: Tensor, threshold: float) -> Tensor:
    """Blocks, bool (visited,), that the rule ``mass`` keeps, from (rows, visited) and (rows,), log2 units."""
    agrees = (block_mass - lse_before[:, None] <= threshold) & (lse_before[:, None] != math.inf)
    agrees |= block_mass == -math.inf
    return ~agrees.all(0)
