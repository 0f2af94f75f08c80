"""What a worker does in one engine step: which tokens the decode operator computes, and what it read.

The runner's hooks open a step with what the scheduler decided; the first metadata builder of the step makes the
plan; attention layers carry it out and add up the blocks that they visited. A device may do so long after the step
was closed: they are counted when a later step finds that they have arrived.
"""

from __future__ import annotations

import math
import os
import zlib
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lite_attention.backend.requests import SCRATCH_SLOT, DecodeToken, RequestTable
from lite_attention.backend.vllm.device import Readback
from lite_attention.backend.vllm.plugin import METRICS_DIRECTORY_VARIABLE
from lite_attention.serving.metrics import StepCounters
from lite_attention.serving.params import DENSE, RequestOptions, ServerOptions, parse_request_lenient
from lite_attention.tiles import DECODE_BLOCK, ceil_div

MAX_KEPT_REQUESTS = 65536
"""Ended requests whose sparsity is kept until somebody asks."""

GOLDEN_RATIO = (5**0.5 - 1) / 2

REPLAY = ""
"""The profile of requests that are replayed; a server's have names."""


class Wave:
    """Tokens of different sequences that the decode operator computes in one call.

    A sequence that decodes has one token in the first wave. One that was preempted computes its generated tokens
    again, one a wave, so that each sees the state that it saw the first time. Tokens that read everything have the
    threshold -inf.

    Attributes:
        rows: (tokens,) int64, the batch's row of each token.
        indices: (tokens,) int64, place of each token in the batch.
        seq_lens, slots, visit_all: see `lite_attention.reference.decode`.
        thresholds: (layers, tokens) float32, contiguous; of each layer what `lite_attention.reference.decode` takes.
        checked: places in the wave of the tokens that are also computed dense, to measure what skipping costs.
    """

    def __init__(
        self,
        tokens: Sequence[DecodeToken],
        rows: Sequence[int],
        indices: Sequence[int],
        thresholds: Tensor,
        checked: Sequence[int] = (),
    ) -> None:
        self.tokens = tokens
        self.thresholds = thresholds
        self.checked = checked
        self.rows = torch.tensor(rows)
        self.indices = torch.tensor(indices)
        self.seq_lens = torch.tensor([token.position + 1 for token in tokens], dtype=torch.int32)
        self.slots = torch.tensor([token.slot for token in tokens], dtype=torch.int32)
        self.visit_all = torch.tensor([token.visit_all for token in tokens])


@dataclass
class StepPlan:
    """How the tokens of a step are computed: in waves by the decode operator, the others by stock attention.

    Attributes:
        waves: calls of the decode operator, in order.
        stock_rows: rows of the batch that stock attention computes; a row may also have tokens in waves, which
            then replace what stock attention gave.
        visited: (places,) int32, to which the layers add the blocks that they visit; None until one takes part.
        places: the place of each token, wave by wave.
        kv_heads: KV heads of the layers that take part.
        errors: (checked tokens, 2) float32, to which the layers add their relative error and 1; None until one does.
    """

    waves: list[Wave]
    stock_rows: list[int]
    visited: Tensor | None = None
    places: Sequence[int] = ()
    kv_heads: int = 0
    errors: Tensor | None = None

    @property
    def tokens(self) -> list[DecodeToken]:
        return [token for wave in self.waves for token in wave.tokens]

    @property
    def skipping(self) -> int:
        """How many tokens may skip."""
        return sum(token.threshold > -math.inf for token in self.tokens)

    def visited_by_wave(self, device: torch.device | str) -> tuple[Tensor, ...]:
        """For each wave the places of its tokens, on a device."""
        sizes = [len(wave.tokens) for wave in self.waves]
        if self.visited is None:
            self.visited = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
            self.places = range(sum(sizes))
        return self.visited.split(sizes)

    def errors_by_wave(self, device: torch.device | str) -> tuple[Tensor, ...]:
        """For each wave the errors of its checked tokens, on a device."""
        sizes = [len(wave.checked) for wave in self.waves]
        if self.errors is None:
            self.errors = torch.zeros(sum(sizes), 2, dtype=torch.float32, device=device if any(sizes) else "cpu")
        return self.errors.split(sizes)

    @property
    def checked(self) -> list[DecodeToken]:
        """The tokens that `errors` are of."""
        return [wave.tokens[place] for wave in self.waves for place in wave.checked]


@dataclass
class _Step:
    first_positions: dict[str, int]
    request_ids: Callable[[], Sequence[str]]
    plan: StepPlan | None = None


@dataclass(frozen=True)
class _Visits:
    """What the layers visited in a step, on its way."""

    plan: StepPlan
    visited: Readback
    errors: Readback | None

    def arrived(self) -> bool:
        return self.visited.arrived() and (self.errors is None or self.errors.arrived())


@dataclass
class RequestStats:
    """Blocks that a request's decode steps visited, and how many there were, over all layers and KV heads."""

    visited: int = 0
    total: int = 0


@dataclass
class StepTracker:
    """Bookkeeping of one worker.

    Args:
        server: the server's defaults and limits.
        slots: rows of the pooled state.
        counters: where the metrics are counted; None on ranks whose rows another rank counts.
        dense_rows: whether the decode operator computes rows of one token that do not skip, too. Where it does so in
            batches that hold nothing else, it must in all: a request's tokens would depend on its batch otherwise.
        layers: names of the engine's layers that skip, in the order of their numbers; those of this rank.
    """

    server: ServerOptions
    slots: int
    counters: StepCounters | None
    dense_rows: bool = False
    layers: Sequence[str] = ()
    table: RequestTable = field(init=False)
    stats: OrderedDict[str, RequestStats] = field(default_factory=OrderedDict)
    _step: _Step | None = None
    _memory_counted: bool = False
    _visits: deque[_Visits] = field(default_factory=deque)
    _profiles: dict[str, Tensor] = field(default_factory=dict)
    _replay: tuple[int, RequestOptions] | None = None

    def __post_init__(self) -> None:
        self.table = RequestTable(self.slots)
        for name, profile in self.server.profiles.items():
            self._profiles[name] = self._by_layer(profile.thresholds)

    def _by_layer(self, thresholds: Mapping[str, float]) -> Tensor:
        return torch.tensor([thresholds[layer] for layer in self.layers], dtype=torch.float32)

    def replay(self, prompt_tokens: int, thresholds: Mapping[str, float], refresh_interval: int) -> None:
        """Until `end_replay`, requests that start have so many tokens of prompt.

        What goes on behind it is computed token by token, as it would be if the request had generated it.

        Args:
            thresholds: of each layer by name.
        """
        self._profiles[REPLAY] = self._by_layer(thresholds)
        options = RequestOptions(
            threshold=0.0, enable=True, refresh_interval=refresh_interval, warmup_steps=0, profile=REPLAY
        )
        self._replay = prompt_tokens, options

    def end_replay(self) -> None:
        self._replay = None

    @contextmanager
    def step(self, scheduled: Any, request_ids: Callable[[], Sequence[str]]) -> Iterator[None]:
        """One step of the engine: `scheduled` is vLLM's SchedulerOutput, `request_ids` gives the batch's row order.

        The order is final only when the first metadata builder runs.
        """
        self._follow_scheduler(scheduled)
        self._step = step = _Step(first_positions(scheduled), request_ids)
        try:
            yield
        finally:
            self._step = None
        if step.plan is not None and step.plan.visited is not None and step.plan.skipping:
            errors = None
            if step.plan.errors is not None and step.plan.checked:
                errors = Readback(step.plan.errors)
            self._visits.append(_Visits(step.plan, Readback(step.plan.visited), errors))
        while self._visits and self._visits[0].arrived():
            self._count(self._visits.popleft())

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """A run that serves no request (profiling, padding)."""
        step, self._step = self._step, None
        try:
            yield
        finally:
            self._step = step

    def plan(self, query_start: Sequence[int], kv_heads: int, reason: str | None) -> StepPlan | None:
        """The plan of the step in progress, for layers that have not asked in this step yet.

        Args:
            query_start: first token of each row of the batch, and the number of tokens.
            kv_heads: of all these layers.
            reason: why stock attention computes these layers, if it does.

        Returns:
            None when stock attention computes every token of these layers.
        """
        step = self._step
        if step is None:
            return None
        if step.plan is None:
            step.plan = self._make_plan(step, query_start)
        if not step.plan.waves:
            return None
        if reason is not None:
            self.fell_back(reason, step.plan.skipping)
            return None
        step.plan.kv_heads += kv_heads
        return step.plan

    def take_stats(self) -> dict[str, tuple[int, int]]:
        """Blocks visited and total by request since the last call; waits for the device."""
        while self._visits:
            self._count(self._visits.popleft())
        taken = {request_id: (stats.visited, stats.total) for request_id, stats in self.stats.items()}
        self.stats.clear()
        return taken

    def fell_back(self, reason: str, rows: int) -> None:
        """Decode rows that ask for skipping went to stock attention."""
        if self.counters is not None and rows:
            self.counters.add_fallback(reason, rows)

    def count_memory(self, state_bytes: Callable[[], int]) -> None:
        """Call this after steps: what state takes is asked for once, when the first has allocated all of it."""
        if not self._memory_counted and self.counters is not None:
            self.counters.set_state_bytes(state_bytes())
        self._memory_counted = True

    def _follow_scheduler(self, scheduled: Any) -> None:
        for request_id in scheduled.finished_req_ids:
            self.table.finish(request_id)
        for request_id in scheduled.preempted_req_ids or ():
            self.table.preempt(request_id)
        for new in scheduled.scheduled_new_reqs:
            self._start(new)
        for request_id in scheduled.scheduled_cached_reqs.resumed_req_ids:
            self.table.preempt(request_id)
        if self.counters is not None:
            self.counters.set_active_slots(self.table.active_slots)

    def _start(self, new: Any) -> None:
        if new.sampling_params is None or new.prompt_token_ids is None:  # pooling; embeddings given as the prompt
            self.table.start(new.req_id, DENSE, 0)
            return
        if self._replay is not None:
            prompt_tokens, options = self._replay
            self.table.start(new.req_id, options, prompt_tokens)
            return
        options = parse_request_lenient(new.sampling_params.extra_args, self.server)
        if options is DENSE:
            self.fell_back("bad_options", 1)
        self.table.start(new.req_id, options, len(new.prompt_token_ids))

    def _make_plan(self, step: _Step, query_start: Sequence[int]) -> StepPlan:
        request_ids = step.request_ids()
        batch = frozenset(request_ids)
        waves: defaultdict[int, list[tuple[DecodeToken, int, int]]] = defaultdict(list)
        stock_rows = []
        for row, (request_id, (begin, end)) in enumerate(zip(request_ids, pairwise(query_start), strict=False)):
            start = step.first_positions.get(request_id)
            skips_from = self.table.skips_from(request_id)
            if start is None:
                stock_rows.append(row)
                continue
            count = end - begin
            first = start + count if skips_from is None else max(start, skips_from)
            if first > start and count == 1 and self.dense_rows:
                dense = DecodeToken(request_id, start, SCRATCH_SLOT, -math.inf, visit_all=False)
                waves[0].append((dense, row, begin))
            elif first > start:
                stock_rows.append(row)
            for position in range(first, start + count):
                token = self.table.decode_token(request_id, position, batch)
                waves[position - first].append((token, row, begin + position - start))
        return StepPlan([self._wave(*zip(*waves[number], strict=True)) for number in sorted(waves)], stock_rows)

    def _wave(self, tokens: Sequence[DecodeToken], rows: Sequence[int], indices: Sequence[int]) -> Wave:
        of_tokens = torch.tensor([token.threshold for token in tokens], dtype=torch.float32)
        thresholds = of_tokens.repeat(len(self.layers), 1)
        for place, token in enumerate(tokens):
            if token.profile is not None:
                thresholds[:, place] = self._profiles[token.profile]
        share = self.server.check_share
        checked = [place for place, token in enumerate(tokens) if share and is_checked(token, share)]
        return Wave(tokens, rows, indices, thresholds, checked)

    def _count(self, visits: _Visits) -> None:
        plan, visited_at = visits.plan, visits.visited.values()
        for token, place in zip(plan.tokens, plan.places, strict=True):
            if token.threshold == -math.inf:
                continue
            visited, total = visited_at[place], plan.kv_heads * ceil_div(token.position + 1, DECODE_BLOCK)
            if self.counters is not None:
                self.counters.add_rows(token.threshold, 1, visited, total)
            stats = self.stats.setdefault(token.request_id, RequestStats())
            stats.visited += visited
            stats.total += total
        if visits.errors is not None and self.counters is not None:
            for token, (error, layers) in zip(plan.checked, visits.errors.values(), strict=True):
                if layers:
                    self.counters.add_error(token.threshold, error / layers)
        while len(self.stats) > MAX_KEPT_REQUESTS:
            self.stats.popitem(last=False)


def is_checked(token: DecodeToken, share: float) -> bool:
    """Whether a token is one of the share that is checked: says the same whenever it is computed, and beside whom.

    Multiples of the golden ratio spread evenly, so each request has its share; where it begins is the request's own.
    """
    drawn = (zlib.crc32(token.request_id.encode(errors="replace")) / 2**32 + token.position * GOLDEN_RATIO) % 1
    return token.threshold > -math.inf and drawn < share


def first_positions(scheduled: Any) -> dict[str, int]:
    """The first position that each request of a step computes, as its scheduler says: the device is not asked."""
    cached = scheduled.scheduled_cached_reqs
    positions = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    positions.update((new.req_id, new.num_computed_tokens) for new in scheduled.scheduled_new_reqs)
    return positions


_tracker: StepTracker | None = None


def create_tracker(
    server: ServerOptions, slots: int, rank: int, counts_rows: bool, dense_rows: bool, layers: Sequence[str]
) -> StepTracker:
    """Start this worker's bookkeeping."""
    global _tracker
    directory = os.environ.get(METRICS_DIRECTORY_VARIABLE)
    counters = None
    if directory is not None and counts_rows:
        counters = StepCounters.create(Path(directory) / f"worker-{os.getpid()}-{rank}", slots=slots - 1)
    _tracker = StepTracker(server, slots, counters, dense_rows, layers)
    return _tracker


def tracker() -> StepTracker | None:
    """This worker's bookkeeping; None before its first step."""
    return _tracker
