"""What a worker does in one engine step: which tokens the decode operator computes, and what it read.

The runner's hooks open a step with what the scheduler decided; the first metadata builder of the step makes the
plan; attention layers carry it out and add up the blocks that they visited; closing the step counts them.
"""

from __future__ import annotations

import os
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lite_attention.backend.requests import DecodeToken, RequestTable
from lite_attention.backend.vllm import state
from lite_attention.backend.vllm.plugin import METRICS_DIRECTORY_VARIABLE
from lite_attention.serving.metrics import StepCounters
from lite_attention.serving.params import DENSE, ServerOptions, parse_request_lenient
from lite_attention.tiles import DECODE_BLOCK, ceil_div

MAX_KEPT_REQUESTS = 65536
"""Ended requests whose sparsity is kept until somebody asks."""


class Wave:
    """Tokens of different sequences that the decode operator computes in one call.

    A sequence that decodes has one token in the first wave. One that was preempted computes its generated tokens
    again, one a wave, so that each sees the state that it saw the first time.
    """

    def __init__(self, tokens: Sequence[DecodeToken], rows: Sequence[int], indices: Sequence[int]) -> None:
        self.tokens = tokens
        self.rows = torch.tensor(rows)
        self.indices = torch.tensor(indices)
        self.seq_lens = torch.tensor([token.position + 1 for token in tokens], dtype=torch.int32)
        self.slots = torch.tensor([token.slot for token in tokens], dtype=torch.int32)
        self.thresholds = torch.tensor([token.threshold for token in tokens], dtype=torch.float32)
        self.visit_all = torch.tensor([token.visit_all for token in tokens])
        self.visited = torch.zeros(len(tokens), dtype=torch.int64)
        self.kv_heads_run = 0

    def count(self, visited: Tensor, kv_heads: int) -> None:
        """Add what one layer visited of each token's context."""
        self.visited += visited
        self.kv_heads_run += kv_heads


@dataclass
class StepPlan:
    """How the tokens of a step are computed: in waves by the decode operator, the others by stock attention.

    Attributes:
        waves: calls of the decode operator, in order.
        stock_rows: rows of the batch that stock attention computes; a row may also have tokens in waves, which
            then replace what stock attention gave.
    """

    waves: list[Wave]
    stock_rows: list[int]


@dataclass
class _Step:
    request_ids: Callable[[], Sequence[str]]
    plan: StepPlan | None = None


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
    """

    server: ServerOptions
    slots: int
    counters: StepCounters | None
    table: RequestTable = field(init=False)
    stats: OrderedDict[str, RequestStats] = field(default_factory=OrderedDict)
    _step: _Step | None = None

    def __post_init__(self) -> None:
        self.table = RequestTable(self.slots)

    @contextmanager
    def step(self, scheduled: Any, request_ids: Callable[[], Sequence[str]]) -> Iterator[None]:
        """One step of the engine: `scheduled` is vLLM's SchedulerOutput, `request_ids` gives the batch's row order.

        The order is final only when the first metadata builder runs.
        """
        self._follow_scheduler(scheduled)
        self._step = _Step(request_ids)
        try:
            yield
            if self._step.plan is not None:
                self._count(self._step.plan)
        finally:
            self._step = None

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """A run that serves no request (profiling, padding)."""
        step, self._step = self._step, None
        try:
            yield
        finally:
            self._step = step

    def plan(self, query_start: Sequence[int], seq_lens: Sequence[int]) -> StepPlan | None:
        """The plan of the step in progress, made at its first call; None when there is nothing to skip."""
        if self._step is None:
            return None
        if self._step.plan is None:
            self._step.plan = self._make_plan(self._step.request_ids(), query_start, seq_lens)
        return self._step.plan if self._step.plan.waves else None

    def take_stats(self) -> dict[str, tuple[int, int]]:
        """Blocks visited and total by request since the last call."""
        taken = {request_id: (stats.visited, stats.total) for request_id, stats in self.stats.items()}
        self.stats.clear()
        return taken

    def fell_back(self, reason: str, rows: int) -> None:
        """Decode rows that ask for skipping went to stock attention."""
        if self.counters is not None and rows:
            self.counters.add_fallback(reason, rows)

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
        options = parse_request_lenient(new.sampling_params.extra_args, self.server)
        if options is DENSE:
            self.fell_back("bad_options", 1)
        self.table.start(new.req_id, options, len(new.prompt_token_ids))

    def _make_plan(self, request_ids: Sequence[str], query_start: Sequence[int], seq_lens: Sequence[int]) -> StepPlan:
        batch = frozenset(request_ids)
        waves: defaultdict[int, tuple[list[DecodeToken], list[int], list[int]]]
        waves = defaultdict(lambda: ([], [], []))
        stock_rows = []
        for row, end in enumerate(seq_lens):
            request_id = request_ids[row] if row < len(request_ids) else None
            start = end - (query_start[row + 1] - query_start[row])
            skips_from = self.table.skips_from(request_id) if request_id is not None else None
            first = end if skips_from is None else max(start, skips_from)
            if first > start or start == end:
                stock_rows.append(row)
            for position in range(first, end):
                assert request_id is not None
                tokens, rows, indices = waves[position - first]
                tokens.append(self.table.decode_token(request_id, position, batch))
                rows.append(row)
                indices.append(query_start[row] + position - start)
        return StepPlan([Wave(*waves[number]) for number in sorted(waves)], stock_rows)

    def _count(self, plan: StepPlan) -> None:
        for wave in plan.waves:
            for token, visited in zip(wave.tokens, wave.visited.tolist(), strict=True):
                total = wave.kv_heads_run * ceil_div(token.position + 1, DECODE_BLOCK)
                if self.counters is not None:
                    self.counters.add_rows(token.threshold, 1, visited, total)
                stats = self.stats.setdefault(token.request_id, RequestStats())
                stats.visited += visited
                stats.total += total
        if self.counters is not None:
            self.counters.set_state_bytes(state.memory_bytes())
        while len(self.stats) > MAX_KEPT_REQUESTS:
            self.stats.popitem(last=False)


_tracker: StepTracker | None = None


def create_tracker(server: ServerOptions, slots: int, rank: int, counts_rows: bool) -> StepTracker:
    """Start this worker's bookkeeping."""
    global _tracker
    directory = os.environ.get(METRICS_DIRECTORY_VARIABLE)
    counters = None
    if directory is not None and counts_rows:
        counters = StepCounters.create(Path(directory) / f"worker-{os.getpid()}-{rank}", slots=slots - 1)
    _tracker = StepTracker(server, slots, counters)
    return _tracker


def tracker() -> StepTracker | None:
    """This worker's bookkeeping; None before its first step."""
    return _tracker
