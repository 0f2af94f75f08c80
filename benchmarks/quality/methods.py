"""Ways to skip, for measuring quality: the product itself, and an emulator of policies that no kernel has yet.

A layer's attention is an object that is called once a step and keeps what its way of skipping has to remember:
`DenseAttention`, `ProductAttention` (`lite_attention.LiteAttention`, on whatever runs it) or `EmulatedAttention`. The
last one computes every score, also of blocks that are skipped, so it gives exact results and statistics for any
policy, and no idea of its speed. A policy is put together from a grid, a decision (which blocks to visit in the next
step, from statistics of this one), summaries that stand in for skipped blocks, and a refresh interval.

`METHODS` lists those that are compared, each with the thresholds at which it is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from lite_attention import LiteAttention, ops
from lite_attention.backend.denoising import Phase, phase, risen
from lite_attention.options import Rule
from lite_attention.reference import LOG2_E, SUMMARY_BEND, spread
from lite_attention.tiles import BLOCK_K, TILE_Q, ceil_div

SCORES_AT_ONCE = 2**28
"""Scores that the emulator keeps in memory at a time, float32."""


class Attention(Protocol):
    """Attention of one layer and guidance branch, called once a step.

    Attributes:
        sparsity: share of (query tile, key block) pairs that the last call skipped, float32 (); one whose scores are
            computed but not used counts half, as that is half of its products.
        dropped: share of the softmax mass in those pairs, mean over batch, heads and queries, float32 ().
    """

    sparsity: Tensor
    dropped: Tensor

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, phase: Phase = "skip") -> Tensor:
        """Attention of a step, (batch, tokens, heads, head_dim) each."""
        ...

    def milliseconds(self) -> float | None:
        """Time that the device spent in all calls so far; None where that says nothing."""
        ...


HELD_CYCLES = 2_000_000
"""Of a GPU's clock, about 1 ms: longer than it takes to launch an attention."""


class Stopwatch:
    """Time between CUDA events around calls; None on devices without them.

    The device is held up before each call, so that it never waits for launches within: this model's attention takes
    about as long as launching it, that of larger ones much longer.
    """

    def __init__(self) -> None:
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __call__(self, function: Callable[[], Tensor], device: torch.device) -> Tensor:
        """Call ``function`` and note how long the device takes."""
        if device.type != "cuda":
            return function()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(HELD_CYCLES)
        start.record()
        result = function()
        end.record()
        self._events.append((start, end))
        return result

    def milliseconds(self) -> float | None:
        """Sum over all calls; waits for the device."""
        if not self._events:
            return None
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in self._events)


class DenseAttention:
    """PyTorch's own attention, which the others are compared with."""

    def __init__(self) -> None:
        self.sparsity = self.dropped = torch.zeros(())
        self._stopwatch = Stopwatch()

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, phase: Phase = "skip") -> Tensor:
        return self._stopwatch(lambda: dense_attention(query, key, value), query.device)

    def milliseconds(self) -> float | None:
        return self._stopwatch.milliseconds()


def dense_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`scaled_dot_product_attention` of (batch, tokens, heads, head_dim) each."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


class ProductAttention:
    """`lite_attention.LiteAttention`; a threshold of -inf is its dense attention."""

    def __init__(self, threshold: float | dict[int, float], rule: Rule, refresh_interval: int = 0) -> None:
        self.sparsity = self.dropped = torch.zeros(())
        self._layer = LiteAttention(threshold, rule=rule, refresh_interval=refresh_interval)
        self._dense = LiteAttention(-math.inf)
        self._stopwatch = Stopwatch()

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, phase: Phase = "skip") -> Tensor:
        def attend() -> Tensor:
            return cast(Tensor, self._layer(query, key, value, visit_all=phase == "learn"))

        state = self._layer.skip_state
        before = None if state is None else state.mask.clone()
        self._layer.enable_skip_optimization(phase != "dense")
        out = self._stopwatch(attend, query.device)
        self.sparsity = torch.as_tensor(self._layer.sparsity_tensor, dtype=torch.float32)
        self.dropped = torch.zeros((), device=query.device)
        if before is not None:
            # Of visited scores alone: with summaries the log-sum-exp of the step itself has estimates of the others.
            thresholds = torch.zeros(query.shape[0], device=query.device)
            visited = ops.visited_lse(query, key, value, before, thresholds, None, None, query.shape[3] ** -0.5)
            _, lse = self._dense(query, key, value, return_softmax_lse=True)
            dropped = -torch.expm1((visited - lse).clamp(max=0)).mean()
            # A step that refreshes or is dense visits all, whatever its mask was.
            self.dropped = torch.where(self.sparsity.to(query.device) > 0, dropped, 0.0)
        return out

    def milliseconds(self) -> float | None:
        return self._stopwatch.milliseconds()


# --- The emulator: what a policy is made of


@dataclass(frozen=True)
class Grid:
    """Grain of skipping, in tokens."""

    tile_q: int = TILE_Q
    block_k: int = BLOCK_K


class Statistics(NamedTuple):
    """What a policy knows of each (tile, block) after a step: float32 (batch, heads, tiles, blocks) each.

    Of a skipped block the share is the one that its summary says, or, without summaries, that of its last visit; the
    margin is always that of its last visit.
    """

    margin: Tensor
    """Largest over the tile's rows of max(s in block) - max(s in blocks visited before), log2 units; +inf in the first
    block visited."""
    share: Tensor
    """Largest over the tile's rows of the block's mass over the row's LSE of the step before, log2 units; +inf in the
    first step. Of a block found negligible in the pass it is an upper bound, from its largest score."""
    tile_share: Tensor
    """Mean over the tile's rows of the block's share of this step's softmax, 0 to 1."""


class Decision(Protocol):
    """Which blocks the next step visits: bool, shape of the statistics. A tile for which that is none keeps one."""

    def __call__(self, statistics: Statistics) -> Tensor: ...


@dataclass(frozen=True)
class RunningMax:
    """The published rule, as `lite_attention.reference.forward` says."""

    threshold: float

    def __call__(self, statistics: Statistics) -> Tensor:
        return statistics.margin > self.threshold


@dataclass(frozen=True)
class Mass:
    """The rule ``mass``, as `lite_attention.reference.forward` says; with summaries blocks come back by theirs."""

    threshold: float

    def __call__(self, statistics: Statistics) -> Tensor:
        return statistics.share > self.threshold


@dataclass(frozen=True)
class RelativeMass:
    """`Mass` with a threshold relative to the share that a block has in a uniform softmax, 1 / blocks."""

    threshold: float

    def __call__(self, statistics: Statistics) -> Tensor:
        return statistics.share + math.log2(statistics.share.shape[-1]) > self.threshold


@dataclass(frozen=True)
class MassBudget:
    """Drops a tile's smallest blocks as long as the mass of all that are dropped is at most ``2**threshold``.

    A block's mass is its share of the tile's rows together (``mean``), or of the row in which it is largest
    (``worst``), which bounds what any row loses.
    """

    threshold: float
    over: Literal["mean", "worst"] = "mean"

    def __call__(self, statistics: Statistics) -> Tensor:
        shares = statistics.tile_share if self.over == "mean" else statistics.share.exp2()
        ascending, order = shares.sort(dim=-1)
        kept = ascending.cumsum(-1) > 2.0**self.threshold
        return torch.empty_like(kept).scatter_(-1, order, kept)


@dataclass(frozen=True)
class BinnedBudget:
    """`MassBudget` over means without a sort, as a kernel could have it: masses are summed in 32 bins, each of a power
    of two of the share, and bins are dropped whole."""

    threshold: float

    def __call__(self, statistics: Statistics) -> Tensor:
        shares = statistics.tile_share
        bins = shares.log2().floor().clamp(-31, 0).long() + 31
        masses = torch.zeros(*shares.shape[:-1], 32, device=shares.device).scatter_add_(-1, bins, shares)
        return (masses.cumsum(-1) > 2.0**self.threshold).gather(-1, bins)


Order = Literal["descending", "heaviest"]
"""In which a tile visits blocks: from the last to the first; or so, but the one first that had the largest share of the
tile's softmax in the step before."""

Summaries = Literal["none", "mean", "variance", "bend"]
"""What stands in for a skipped block: nothing; n keys at the mean; Gaussian keys, independent in each channel, and
infinitely many of them (``variance``) or n (``bend``).

Its estimated mass times its mean value takes part in the softmax, as in the rule ``mass_summaries``, which is `Mass`
with ``bend``, of `lite_attention.reference.forward`; summaries are not rounded.
"""


@dataclass(frozen=True)
class Policy:
    """A way to skip."""

    decision: Decision
    grid: Grid = Grid()
    summaries: Summaries = "none"
    refresh_interval: int = 0
    """Every so many steps all blocks are visited; 0 for never."""
    rotating: bool = False
    """Instead, each step visits those whose turn it is, every ``refresh_interval``-th."""
    order: Order = "descending"
    in_pass: float = -math.inf
    """A block that is visited takes part in neither the softmax nor the output where its margin is no larger."""


# --- The emulator: how it is computed


class EmulatedAttention:
    """Attention of one layer under any policy; all of it is computed, and the skipped part left out.

    Attributes:
        visited: the blocks that the last call visited, bool (batch, heads, tiles, blocks).
        visits: the blocks that the next one will visit unless it refreshes; None before the first.
        lse: log-sum-exp of what took part in the last softmax that skipped, float32 (batch, heads, tokens_q), log2
            units; None before the first.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.sparsity = self.dropped = torch.zeros(())
        self.visited: Tensor | None = None
        self.visits: Tensor | None = None
        self.lse: Tensor | None = None
        self._statistics: Statistics | None = None
        self._steps = 0

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, phase: Phase = "skip") -> Tensor:
        policy, grid = self.policy, self.policy.grid
        batch, tokens_q, heads, _ = query.shape
        tiles, blocks = ceil_div(tokens_q, grid.tile_q), ceil_div(key.shape[1], grid.block_k)
        visits = torch.ones(batch, heads, tiles, blocks, dtype=torch.bool, device=query.device)
        first = None
        if phase == "learn":
            self._steps = 0
        if phase == "skip" and self.visits is not None:
            visits = self.visits | self._refreshed(blocks).to(query.device)
            if policy.order == "heaviest" and self._statistics is not None:
                first = self._statistics.tile_share.argmax(-1)
        in_pass = policy.in_pass if phase == "skip" else -math.inf
        with torch.autocast(query.device.type, enabled=False):
            step = attend(query, key, value, visits, self.lse, grid, policy.summaries, first, in_pass)
        self.visited = visits
        self.sparsity = 1.0 - (visits.float().mean() + step.used.float().mean()) / 2
        self.dropped = step.dropped.mean()
        if phase != "dense":
            self._steps += 1
            self.lse = step.lse
            self._statistics = self._known(step.statistics, visits)
            kept = policy.decision(self._statistics)
            # Where all would go, the last of those visited stays.
            last = blocks - 1 - visits.flip(-1).int().argmax(-1, keepdim=True)
            is_last = torch.arange(blocks, device=query.device) == last
            self.visits = kept | (is_last & ~kept.any(-1, keepdim=True))
        return step.out

    def milliseconds(self) -> None:
        """None: the emulator's time says nothing."""

    def _refreshed(self, blocks: int) -> Tensor:
        """The blocks that the coming step visits whatever was decided, bool (blocks,)."""
        interval = self.policy.refresh_interval
        if self.policy.rotating:
            return torch.arange(blocks) % interval == self._steps % interval
        return torch.full((blocks,), interval > 0 and self._steps % interval == 0)

    def _known(self, now: Statistics, visited: Tensor) -> Statistics:
        """Statistics of this step, and of blocks that it knows nothing of, what was known before."""
        before = self._statistics
        if before is None:
            return now
        margin = torch.where(visited, now.margin, before.margin)
        if self.policy.summaries != "none":
            return now._replace(margin=margin)
        share = torch.where(visited, now.share, before.share)
        return Statistics(margin, share, torch.where(visited, now.tile_share, before.tile_share))


class Step(NamedTuple):
    """Attention of one step, and what can be known of it."""

    out: Tensor
    """Shape and type of the query."""
    lse: Tensor
    """Of what took part in the softmax, float32 (batch, heads, tokens_q), log2 units."""
    dropped: Tensor
    """Share of the dense softmax in blocks that are skipped or not used, float32 (batch, heads, tokens_q)."""
    used: Tensor
    """The visited blocks but those found negligible in the pass, bool (batch, heads, tiles, blocks)."""
    statistics: Statistics
    """Of visited blocks; of skipped ones the shares that summaries say, else 0 (-inf)."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visits: Tensor,
    lse_before: Tensor | None,
    grid: Grid,
    summaries: Summaries = "none",
    first: Tensor | None = None,
    in_pass: float = -math.inf,
) -> Step:
    """Attention over the blocks that are visited and used, and over summaries of the others.

    Args:
        query: (batch, tokens_q, heads, head_dim), any float type; computed in float32, in float64 if it is that.
        key, value: (batch, tokens_k, kv_heads, head_dim).
        visits: bool (batch, heads, tiles, blocks).
        lse_before: of the step before, float32 (batch, heads, tokens_q), log2 units; None in the first step.
        grid: tokens of a tile and of a block.
        summaries: what stands in for skipped blocks.
        first: block that a tile visits before the others, int64 (batch, heads, tiles); None for the last visited.
        in_pass: visited blocks with a margin of at most this are not used.
    """
    batch, tokens_q, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    tiles, blocks = visits.shape[2:]
    tiles_at_once = max(SCORES_AT_ONCE // (grid.tile_q * blocks * grid.block_k), 1)
    out = torch.empty_like(query)
    lse = torch.empty(batch, heads, tokens_q, dtype=torch.float32, device=query.device)
    dropped = torch.empty_like(lse)
    used = torch.empty_like(visits)
    statistics = Statistics(*torch.empty(3, *visits.shape, dtype=torch.float32, device=query.device))
    for row in range(batch):
        for head in range(heads):
            kv_head = head * kv_heads // heads
            keys = _Keys(key[row, :, kv_head], value[row, :, kv_head], grid.block_k, summaries)
            for tile in range(0, tiles, tiles_at_once):
                some_tiles = slice(tile, tile + tiles_at_once)
                rows = slice(tile * grid.tile_q, min((tile + tiles_at_once) * grid.tile_q, tokens_q))
                queries = _widened(query[row, rows, head]) * (head_dim**-0.5 * LOG2_E)
                of_tiles = _attend_tiles(
                    queries,
                    keys,
                    visits[row, head, some_tiles],
                    None if lse_before is None else lse_before[row, head, rows],
                    grid.tile_q,
                    None if first is None else first[row, head, some_tiles],
                    in_pass,
                )
                out[row, rows, head] = of_tiles.out.to(out.dtype)
                lse[row, head, rows], dropped[row, head, rows] = of_tiles.lse, of_tiles.dropped
                used[row, head, some_tiles] = of_tiles.used
                for tensor, some in zip(statistics, of_tiles.statistics, strict=True):
                    tensor[row, head, some_tiles] = some
    return Step(out, lse, dropped, used, statistics)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class _Keys:
    """Keys and values of one head by blocks, filled up with zeros, and their summaries."""

    def __init__(self, key: Tensor, value: Tensor, block_k: int, summaries: Summaries) -> None:
        blocks = ceil_div(len(key), block_k)
        filled = (0, 0, 0, blocks * block_k - len(key))
        self.key, self.value = pad(_widened(key), filled), pad(_widened(value), filled)
        self.real = (torch.arange(blocks * block_k, device=key.device) < len(key)).unflatten(0, (blocks, block_k))
        self.summaries = summaries
        if summaries != "none":
            counts = self.real.sum(1, keepdim=True)
            of_block = self.key.unflatten(0, (blocks, block_k))
            self.mean = of_block.sum(1) / counts
            deviations = (of_block - self.mean[:, None]) * self.real[..., None]
            self.variance = deviations.square().sum(1) / counts
            self.mean_value = self.value.unflatten(0, (blocks, block_k)).sum(1) / counts
            self.log2_counts = counts[:, 0].log2()

    def estimate(self, queries: Tensor) -> Tensor:
        """Log2 of the estimated mass of each block, (rows, blocks), for queries times softmax scale * log2(e)."""
        estimates = self.log2_counts + queries @ self.mean.T
        if self.summaries == "mean":
            return estimates
        variance = queries.square() @ self.variance.T / LOG2_E**2
        return estimates + (spread(variance, SUMMARY_BEND) if self.summaries == "bend" else variance / 2 * LOG2_E)


def _attend_tiles(
    queries: Tensor,
    keys: _Keys,
    visit: Tensor,
    lse_before: Tensor | None,
    tile_q: int,
    first: Tensor | None,
    in_pass: float,
) -> Step:
    """Attention of some tiles of one head: `attend` without its leading dimensions, and with queries in log2 units."""

    def of_rows(of_tiles: Tensor) -> Tensor:
        return of_tiles.repeat_interleave(tile_q, 0)[: len(queries)]

    scores = (queries @ keys.key.T).unflatten(1, keys.real.shape)
    scores[:, -1].masked_fill_(~keys.real[-1], -math.inf)
    # Each block is summed below its own maximum, so that its mass is exact however small its share is.
    block_max = scores.amax(2)
    weights = scores.sub_(block_max[..., None]).exp2_()
    mass = block_max + weights.sum(2).log2()
    visited = of_rows(visit)
    margin = _largest(_margins(block_max, visited, None if first is None else of_rows(first)), tile_q)
    used = visit & (margin > in_pass)
    use = of_rows(used)
    if keys.summaries == "none":
        taken = mass.masked_fill(~use, -math.inf)
        known = torch.where(visited & ~use, block_max + keys.real.sum(1).log2(), taken)
    else:
        taken = known = torch.where(use, mass, keys.estimate(queries))
    lse = log2_sum_exp2(taken)
    weights.mul_((block_max - lse[:, None]).exp2_().masked_fill_(~use, 0.0)[..., None])
    out = weights.flatten(1) @ keys.value
    if keys.summaries != "none":
        out += (taken - lse[:, None]).exp2_().masked_fill_(use, 0.0) @ keys.mean_value
    dropped = (mass - log2_sum_exp2(mass)[:, None]).exp2_().masked_fill_(use, 0.0).sum(1)
    share = torch.full_like(known, math.inf) if lse_before is None else known - lse_before[:, None]
    counts = _by_tile(torch.ones_like(lse)[:, None], tile_q, 0.0).sum(1)
    tile_share = _by_tile((taken - lse[:, None]).exp2(), tile_q, 0.0).sum(1) / counts
    return Step(out, lse, dropped, used, Statistics(margin, _largest(share, tile_q), tile_share))


def _margins(block_max: Tensor, visited: Tensor, first: Tensor | None) -> Tensor:
    """The margin of each row by itself, (rows, blocks); -inf where a block is not visited."""
    visited_max = block_max.masked_fill(~visited, -math.inf)
    before = pad(visited_max[:, 1:].flip(1).cummax(1).values.flip(1), (0, 1), value=-math.inf)
    if first is not None:
        before = torch.maximum(before, visited_max.gather(1, first[:, None])).scatter_(1, first[:, None], -math.inf)
    return (visited_max - before).masked_fill(~visited, -math.inf)


def log2_sum_exp2(exponents: Tensor) -> Tensor:
    """Over the last dimension."""
    return torch.logsumexp(exponents / LOG2_E, dim=-1) * LOG2_E


def _largest(of_rows: Tensor, tile_q: int) -> Tensor:
    """Over the rows of each tile, (tiles, blocks)."""
    return _by_tile(of_rows, tile_q, -math.inf).amax(1)


def _by_tile(of_rows: Tensor, tile_q: int, missing: float) -> Tensor:
    """(tiles, tile_q, blocks) from (rows, blocks), filled up where the last tile is short."""
    return pad(of_rows, (0, 0, 0, -len(of_rows) % tile_q), value=missing).unflatten(0, (-1, tile_q))


# --- What is compared


@dataclass(frozen=True)
class Method:
    """A way to skip at one threshold, and between which steps."""

    name: str
    threshold: float
    make: Callable[[], Attention]
    """Attention of a layer that has no state yet."""
    warmup_steps: int = 0
    cooldown_steps: int = 0

    def __str__(self) -> str:
        return self.name if self.threshold == -math.inf else f"{self.name} {self.threshold:g}"

    def phase(self, step: int, steps: int) -> Phase:
        """What a step does, by where it lies between those at either end."""
        return phase(step, steps, self.warmup_steps, self.cooldown_steps)


class Family(NamedTuple):
    """A way to skip, at any threshold."""

    make: Callable[[float], Attention]
    thresholds: tuple[float, ...]
    warmup_steps: int = 0
    cooldown_steps: int = 0


def _emulated(
    decision: Callable[[float], Decision],
    block_k: int = BLOCK_K,
    summaries: Summaries = "none",
    refresh: int = 0,
    rotating: bool = False,
    order: Order = "descending",
) -> Callable[[float], Attention]:
    grid = Grid(block_k=block_k)
    return lambda threshold: EmulatedAttention(
        Policy(decision(threshold), grid, summaries, refresh, rotating=rotating, order=order)
    )


def _in_pass(order: Order = "descending") -> Callable[[float], Attention]:
    """Visits all, and uses what is above the threshold."""
    return lambda threshold: EmulatedAttention(Policy(Mass(-math.inf), order=order, in_pass=threshold))


def _mass_in_pass(below: float, order: Order = "descending") -> Callable[[float], Attention]:
    """`Mass`, and in the pass a threshold so much below: by log2(block_k) no block above its threshold is dropped."""
    return lambda threshold: EmulatedAttention(Policy(Mass(threshold), order=order, in_pass=threshold - below))


def _product(rule: Rule, refresh: int = 0) -> Callable[[float], Attention]:
    return lambda threshold: ProductAttention(threshold, rule, refresh)


def _product_rising(rule: Rule, rise: float, steps: int = 25) -> Callable[[float], Attention]:
    """A threshold that rises by so much over the steps: errors of late steps change a video less."""
    return lambda threshold: ProductAttention(
        {step: risen(threshold, rise, step, steps) for step in range(steps)}, rule
    )


METHODS: dict[str, Family] = {
    "product-dense": Family(_product("mass"), (-math.inf,)),
    "product-running-max": Family(_product("running_max"), (-8, -6, -4, -2)),
    "product-mass": Family(_product("mass"), (-10, -9, -8, -7)),
    "product-mass-summaries": Family(_product("mass_summaries"), (-10, -9, -8, -7)),
    "product-mass-refresh-8": Family(_product("mass", 8), (-9, -8, -7)),
    "product-mass-warmup": Family(_product("mass"), (-9, -8, -7), 5, 2),
    "product-mass-summaries-rising-4": Family(_product_rising("mass_summaries", 4.0), (-11, -10, -9), 3),
    "product-mass-rising-2": Family(_product_rising("mass", 2.0), (-9, -8, -7), 3),
    "product-mass-rising-4": Family(_product_rising("mass", 4.0), (-10, -9, -8), 3),
    "product-mass-rising-4-warmup-5": Family(_product_rising("mass", 4.0), (-10, -9, -8), 5),
    "product-mass-rising-6": Family(_product_rising("mass", 6.0), (-11, -10, -9), 3),
    "product-running-max-rising-4": Family(_product_rising("running_max", 4.0), (-8, -6, -4), 3),
    "running-max-176": Family(_emulated(RunningMax, block_k=176), (-4, -2)),
    "mass-32": Family(_emulated(Mass, block_k=32), (-9, -8)),
    "mass-mean": Family(_emulated(Mass, summaries="mean"), (-8, -7)),
    "mass-variance": Family(_emulated(Mass, summaries="variance"), (-9, -8, -7)),
    "mass-bend": Family(_emulated(Mass, summaries="bend"), (-9, -8, -7)),
    "mass-variance-32": Family(_emulated(Mass, 32, "variance"), (-9, -8)),
    "mass-variance-refresh-16": Family(_emulated(Mass, summaries="variance", refresh=16), (-7,)),
    "relative-mass": Family(_emulated(RelativeMass), (-1,)),
    "budget": Family(_emulated(MassBudget), (-6, -5, -4)),
    "budget-worst-row": Family(_emulated(lambda threshold: MassBudget(threshold, "worst")), (-4, -2)),
    "budget-variance": Family(_emulated(MassBudget, summaries="variance"), (-5, -4, -3)),
    "budget-binned": Family(_emulated(BinnedBudget), (-6, -5, -4)),
    "mass-rotating-8": Family(_emulated(Mass, refresh=8, rotating=True), (-9, -8, -7)),
    "running-max-heaviest": Family(_emulated(RunningMax, order="heaviest"), (-8, -6, -4)),
    "in-pass": Family(_in_pass(), (-8, -6, -4)),
    "in-pass-heaviest": Family(_in_pass("heaviest"), (-8, -6, -4)),
    "mass-in-pass": Family(_mass_in_pass(6.0), (-9, -8, -7)),
    "mass-in-pass-3": Family(_mass_in_pass(3.0), (-9, -8, -7)),
    "mass-in-pass-3-heaviest": Family(_mass_in_pass(3.0, "heaviest"), (-9, -8, -7)),
}


def choose_methods(choices: Iterable[str]) -> list[Method]:
    """Methods that ``choices`` name: ``NAME``, a pattern such as ``product-*``, or either with ``:-8,-7``.

    Raises:
        ValueError: a choice names none, or its thresholds are no numbers.
    """
    methods = []
    for choice in choices:
        pattern, _, numbers = choice.partition(":")
        names = [name for name in METHODS if fnmatchcase(name, pattern)]
        if not names:
            raise ValueError(f"methods: expected a name or pattern of {', '.join(METHODS)}, got {pattern!r}")
        try:
            thresholds = tuple(float(number) for number in numbers.split(",")) if numbers else None
        except ValueError:
            raise ValueError(f"methods: expected numbers with commas behind {pattern}:, got {numbers!r}") from None
        for name in names:
            family = METHODS[name]
            methods += [_method(name, family, threshold) for threshold in thresholds or family.thresholds]
    return methods


def _method(name: str, family: Family, threshold: float) -> Method:
    make = family.make
    return Method(name, threshold, lambda: make(threshold), family.warmup_steps, family.cooldown_steps)
