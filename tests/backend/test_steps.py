"""A worker's step: who computes which token, and what is counted."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from lite_attention.backend.vllm import state, steps
from lite_attention.backend.vllm.steps import StepPlan, StepTracker
from lite_attention.serving.metrics import StepCounters
from lite_attention.serving.params import ServerOptions


def new(name: str, prompt_tokens: int, **options: Any) -> SimpleNamespace:
    extra_args = {f"lite_attn_{key}": value for key, value in options.items()} or None
    params = SimpleNamespace(extra_args=extra_args)
    return SimpleNamespace(req_id=name, sampling_params=params, prompt_token_ids=[0] * prompt_tokens)


def scheduled(
    *started: SimpleNamespace, finished: tuple[str, ...] = (), preempted: tuple[str, ...] = ()
) -> SimpleNamespace:
    return SimpleNamespace(
        finished_req_ids=set(finished),
        preempted_req_ids=set(preempted),
        scheduled_new_reqs=list(started),
        scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=set()),
    )


def tracker(**server: Any) -> StepTracker:
    return StepTracker(ServerOptions(**server), slots=5, counters=None)


def plan(tracker: StepTracker, spans: list[tuple[int, int]]) -> StepPlan | None:
    """The plan for rows that compute positions [start, end)."""
    starts = [0]
    for start, end in spans:
        starts.append(starts[-1] + end - start)
    return tracker.plan(starts, [end for _, end in spans])


def test_prefill_decode_and_recomputed_rows_share_a_batch() -> None:
    worker = tracker()
    rows = ["prefill", "decode", "dense", "resumed", "crossing"]
    starts = [
        new("prefill", 20),
        new("decode", 4),
        new("dense", 4, enable=False),
        new("resumed", 3),
        new("crossing", 6),
    ]
    with worker.step(scheduled(*starts), lambda: rows):
        made = plan(worker, [(0, 10), (4, 5), (4, 5), (3, 6), (4, 8)])
        assert made is not None
        assert made.stock_rows == [0, 2, 4]
        first, second, third = made.waves
        assert [(token.request_id, token.position) for token in first.tokens] == [
            ("decode", 4),
            ("resumed", 3),
            ("crossing", 6),
        ]
        assert first.indices.tolist() == [10, 12, 17]
        assert first.seq_lens.tolist() == [5, 4, 7]
        assert first.visit_all.tolist() == [True, True, True]
        assert second.indices.tolist() == [13, 18]
        assert second.visit_all.tolist() == [False, False]
        assert third.indices.tolist() == [14]


def test_a_step_without_skipping_rows_has_no_plan() -> None:
    worker = tracker(enable=False)
    with worker.step(scheduled(new("a", 2)), lambda: ["a"]):
        assert plan(worker, [(2, 3)]) is None
    assert plan(worker, [(3, 4)]) is None


def test_runs_that_serve_no_request_touch_nothing() -> None:
    worker = tracker()
    with worker.step(scheduled(new("a", 2)), lambda: ["a"]), worker.suspended():
        assert plan(worker, [(2, 3)]) is None
    assert worker.table.active_slots == 0


def test_the_plan_is_made_once_a_step() -> None:
    worker = tracker()
    with worker.step(scheduled(new("a", 2)), lambda: ["a"]):
        assert plan(worker, [(2, 3)]) is plan(worker, [(2, 3)])
    with worker.step(scheduled(), lambda: ["a"]):
        again = plan(worker, [(3, 4)])
        assert again is not None and again.waves[0].visit_all.tolist() == [False]


def test_options_that_slipped_past_the_front_end_make_a_request_dense() -> None:
    worker = tracker()
    with worker.step(scheduled(new("a", 2, threshold="hot"), new("b", 2, nonsense=[[]])), lambda: ["a", "b"]):
        assert plan(worker, [(2, 3), (2, 3)]) is None


def test_what_was_visited_is_counted_by_request_until_asked_for() -> None:
    worker = tracker()
    with worker.step(scheduled(new("a", 32), new("b", 2)), lambda: ["a", "b"]):
        made = plan(worker, [(32, 33), (2, 3)])
        assert made is not None
        for _ in range(2):  # layers
            made.waves[0].count(torch.tensor([4, 2]), kv_heads=2)
    assert worker.take_stats() == {"a": (8, 2 * 2 * 3), "b": (4, 2 * 2 * 1)}
    assert worker.take_stats() == {}


def test_the_memory_of_ended_requests_is_bounded(monkeypatch: Any) -> None:
    monkeypatch.setattr(steps, "MAX_KEPT_REQUESTS", 3)
    worker = tracker()
    for number in range(10):
        name = f"request-{number}"
        with worker.step(scheduled(new(name, 1), finished=(f"request-{number - 1}",)), lambda name=name: [name]):
            plan(worker, [(1, 2)])
    assert list(worker.stats) == ["request-7", "request-8", "request-9"]
    assert worker.table.active_slots == 1


def test_bytes_of_state_are_counted_with_their_summaries(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(state, "_layers", [])
    layer = state.LayerState(slots=5, heads=4, kv_heads=2, max_tokens=1000)
    layer.summaries_of(torch.zeros(7, 32, 2, 8))
    worker = StepTracker(ServerOptions(), 5, StepCounters.create(tmp_path / "worker", slots=4))
    with worker.step(scheduled(new("a", 2)), lambda: ["a"]):
        plan(worker, [(2, 3)])
    masks, lse, summaries = 5 * 2 * 2 * 4, 5 * 4 * 4, 7 * 2 * 2 * (2 * 8 + 8)
    assert StepCounters.open(tmp_path / "worker").read().state_bytes == masks + lse + summaries
