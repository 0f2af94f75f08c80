"""A worker's step: who computes which token, and what is counted."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lite_attention.backend.requests import SCRATCH_SLOT, DecodeToken
from lite_attention.backend.vllm import state, steps
from lite_attention.backend.vllm.steps import StepPlan, StepTracker, is_checked
from lite_attention.serving.metrics import StepCounters, bucket_index
from lite_attention.serving.params import ServerOptions
from tests.profiles import make_profile


def new(name: str, prompt_tokens: int, computed: int = 0, **options: Any) -> SimpleNamespace:
    extra_args = {f"lite_attn_{key}": value for key, value in options.items()} or None
    return SimpleNamespace(
        req_id=name,
        sampling_params=SimpleNamespace(extra_args=extra_args),
        prompt_token_ids=[0] * prompt_tokens,
        num_computed_tokens=computed,
    )


def scheduled(
    *started: SimpleNamespace,
    cached: dict[str, int] | None = None,
    finished: tuple[str, ...] = (),
    preempted: tuple[str, ...] = (),
    resumed: tuple[str, ...] = (),
) -> SimpleNamespace:
    """A SchedulerOutput; `cached` are requests that it has sent before, and how many of their tokens are computed."""
    cached = cached or {}
    return SimpleNamespace(
        finished_req_ids=set(finished),
        preempted_req_ids=set(preempted),
        scheduled_new_reqs=list(started),
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(cached), num_computed_tokens=list(cached.values()), resumed_req_ids=set(resumed)
        ),
    )


def tracker(**server: Any) -> StepTracker:
    return StepTracker(ServerOptions(**server), slots=5, counters=None, layers=("first", "second"))


def plan(tracker: StepTracker, tokens: list[int], reason: str | None = None) -> StepPlan | None:
    """The plan for rows of so many tokens, and layers with two KV heads."""
    return tracker.plan([0, *itertools.accumulate(tokens)], 2, reason)


def test_prefill_decode_and_recomputed_rows_share_a_batch() -> None:
    worker = tracker()
    rows = ["prefill", "decode", "dense", "resumed", "crossing"]
    starts = [
        new("prefill", 20),
        new("decode", 4, computed=4),
        new("dense", 4, computed=4, enable=False),
        new("resumed", 3, computed=3),
        new("crossing", 6, computed=4),
    ]
    with worker.step(scheduled(*starts), lambda: rows):
        made = plan(worker, [10, 1, 1, 3, 4])
        assert made is not None
        assert made.stock_rows == [0, 2, 4]
        first, second, third = made.waves
        assert [(token.request_id, token.position) for token in first.tokens] == [
            ("decode", 4),
            ("resumed", 3),
            ("crossing", 6),
        ]
        assert first.rows.tolist() == [1, 3, 4]
        assert first.indices.tolist() == [10, 12, 17]
        assert first.seq_lens.tolist() == [5, 4, 7]
        assert first.visit_all.tolist() == [True, True, True]
        assert second.indices.tolist() == [13, 18]
        assert second.visit_all.tolist() == [False, False]
        assert third.indices.tolist() == [14]


def test_positions_are_the_schedulers() -> None:
    worker = tracker()
    with worker.step(scheduled(new("a", 7), new("b", 2)), lambda: ["a", "b"]):
        assert plan(worker, [4, 2]) is None
    for computed in ({"a": 4, "b": 2}, {"b": 3, "a": 7}):  # the order of a batch is not the scheduler's
        with worker.step(scheduled(cached=computed), lambda: ["a", "b"]):
            made = plan(worker, [7 - 4 if computed["a"] == 4 else 1, 1])
            assert made is not None
            positions = {token.request_id: token.position for token in made.tokens}
            assert positions == {name: at for name, at in computed.items() if at >= {"a": 7, "b": 2}[name]}


def test_single_tokens_of_prompts_are_no_decode_tokens() -> None:
    worker = tracker()
    starts = [new("one", 1), new("tail", 9, computed=8), new("decode", 3, computed=3)]
    with worker.step(scheduled(*starts), lambda: ["one", "tail", "decode"]):
        made = plan(worker, [1, 1, 1])
        assert made is not None
        assert made.stock_rows == [0, 1]
        assert made.waves[0].rows.tolist() == [2]


def test_where_the_operator_computes_dense_rows_it_does_so_in_every_batch_and_counts_none() -> None:
    worker = StepTracker(ServerOptions(), slots=5, counters=None, dense_rows=True, layers=("only",))
    starts = [
        new("dense", 3, computed=3, enable=False),
        new("tail", 9, computed=8),
        new("prefill", 9, enable=False),
        new("again", 3, computed=3, enable=False),
        new("decode", 3, computed=3),
    ]
    with worker.step(scheduled(*starts), lambda: [start.req_id for start in starts]):
        made = plan(worker, [1, 1, 9, 2, 1])
        assert made is not None
        assert made.stock_rows == [2, 3]
        (wave,) = made.waves
        assert wave.rows.tolist() == [0, 1, 4]
        assert wave.indices.tolist() == [0, 1, 13]
        assert wave.seq_lens.tolist() == [4, 9, 4]
        assert wave.slots.tolist()[:2] == [SCRATCH_SLOT] * 2 and wave.slots[2] != SCRATCH_SLOT
        assert wave.thresholds.tolist() == [[-math.inf, -math.inf, ServerOptions().threshold]]
        made.visited_by_wave("cpu")[0].add_(7)
    assert worker.take_stats() == {"decode": (7, 2)}
    with worker.step(scheduled(cached={"dense": 4}), lambda: ["dense"]):
        again = plan(worker, [1])
        assert again is not None and again.stock_rows == []
        again.visited_by_wave("cpu")
    assert worker.take_stats() == {}


def test_padded_rows_and_requests_that_nobody_announced_are_left_alone() -> None:
    worker = tracker()
    with worker.step(scheduled(new("a", 2, computed=2)), lambda: ["a", "nobody"]):
        made = plan(worker, [1, 1, 0, 0])
        assert made is not None
        assert made.waves[0].rows.tolist() == [0]
        assert made.stock_rows == [1]


def test_a_step_without_skipping_rows_has_no_plan() -> None:
    worker = tracker(enable=False)
    with worker.step(scheduled(new("a", 2, computed=2)), lambda: ["a"]):
        assert plan(worker, [1]) is None
    assert plan(worker, [1]) is None


def test_runs_that_serve_no_request_touch_nothing() -> None:
    worker = tracker()
    with worker.step(scheduled(new("a", 2, computed=2)), lambda: ["a"]), worker.suspended():
        assert plan(worker, [1]) is None
    assert worker.table.active_slots == 0


def test_the_plan_is_made_once_a_step() -> None:
    worker = tracker()
    with worker.step(scheduled(new("a", 2, computed=2)), lambda: ["a"]):
        assert plan(worker, [1]) is plan(worker, [1])
    with worker.step(scheduled(cached={"a": 3}), lambda: ["a"]):
        again = plan(worker, [1])
        assert again is not None and again.waves[0].visit_all.tolist() == [False]


def test_options_that_slipped_past_the_front_end_make_a_request_dense() -> None:
    worker = tracker()
    starts = [new("a", 2, computed=2, threshold="hot"), new("b", 2, computed=2, nonsense=[[]])]
    with worker.step(scheduled(*starts), lambda: ["a", "b"]):
        assert plan(worker, [1, 1]) is None


def test_each_row_has_the_thresholds_of_its_profile_in_every_layer() -> None:
    profiles = {
        "one": make_profile({"second": -3.0, "first": -5.0}),
        "two": make_profile({"first": -math.inf, "second": -2.0}),
    }
    worker = tracker(profiles=profiles, threshold=-4)
    starts = [
        new("a", 2, computed=2, profile="two"),
        new("b", 2, computed=2),
        new("c", 2, computed=2, profile="one"),
        new("d", 2, computed=2, profile="three"),
    ]
    with worker.step(scheduled(*starts), lambda: ["a", "b", "c", "d"]):
        made = plan(worker, [1, 1, 1, 1])
        assert made is not None
        (wave,) = made.waves
        assert wave.thresholds.tolist() == [[-math.inf, -4.0, -5.0], [-2.0, -4.0, -3.0]]
        assert wave.thresholds.is_contiguous()
        assert made.stock_rows == [3]  # nobody told the front end of profile three: dense


@given(st.floats(0, 1), st.text(max_size=20))
def test_the_share_of_tokens_that_is_checked_is_the_one_asked_for(share: float, name: str) -> None:
    tokens = [DecodeToken(name, position, 1, -4.0, False) for position in range(2000)]
    checked = [is_checked(token, share) for token in tokens]
    assert abs(sum(checked) / len(checked) - share) < 0.003
    assert checked == [is_checked(token, share) for token in tokens]
    assert not is_checked(DecodeToken(name, 3, 0, -math.inf, False), 1.0)


def test_errors_of_checked_tokens_are_counted_as_a_mean_over_layers(tmp_path: Path) -> None:
    counters = StepCounters.create(tmp_path / "worker", slots=4)
    worker = StepTracker(ServerOptions(check_share=1), 5, counters, layers=("first", "second"))
    starts = [new("a", 2, computed=2, threshold=-3), new("b", 2, computed=2, enable=False), new("c", 2, computed=2)]
    with worker.step(scheduled(*starts), lambda: ["a", "b", "c"]):
        made = plan(worker, [1, 1, 1])
        assert made is not None and [token.request_id for token in made.checked] == ["a", "c"]
        made.visited_by_wave("cpu")
        for error in (0.02, 0.04):
            (errors,) = made.errors_by_wave("cpu")
            errors += torch.tensor([[error, 1.0], [math.nan, 1.0]])
    read = counters.read()
    at, default = bucket_index(-3), bucket_index(ServerOptions().threshold)
    assert read.checked.sum() == 2
    assert read.checked[at].tolist() == [0, 0, 1, 0, 0, 0, 0] and math.isclose(read.errors[at], 0.03, rel_tol=1e-5)
    assert read.checked[default].tolist() == [0, 0, 0, 0, 0, 0, 1]


def test_a_text_is_replayed_as_if_the_request_had_generated_it() -> None:
    worker = tracker(threshold=-4, check_share=1)
    worker.replay(3, {"second": -2.0, "first": -6.0}, refresh_interval=2)
    with worker.step(scheduled(new("a", 6)), lambda: ["a"]):
        made = plan(worker, [6])
        assert made is not None and made.stock_rows == [0]
        assert [token.position for token in made.tokens] == [3, 4, 5]
        assert [wave.thresholds.tolist() for wave in made.waves] == [[[-6.0], [-2.0]]] * 3
        assert [wave.visit_all.tolist() for wave in made.waves] == [[True], [False], [True]]
        assert [wave.checked for wave in made.waves] == [[0]] * 3
    worker.end_replay()
    with worker.step(scheduled(new("b", 6)), lambda: ["b"]):
        assert plan(worker, [6]) is None


def visit(worker: StepTracker, starts: list[SimpleNamespace], visited: list[int]) -> None:
    """A step in which two groups of layers take part, and visit so many blocks of each row's token."""
    with worker.step(scheduled(*starts), lambda: [start.req_id for start in starts]):
        for _ in range(2):
            made = plan(worker, [1] * len(starts))
            assert made is not None
            (count,) = made.visited_by_wave("cpu")
        count += torch.tensor(visited)


def test_what_was_visited_is_counted_by_request_until_asked_for() -> None:
    worker = tracker()
    visit(worker, [new("a", 32, computed=32), new("b", 2, computed=2)], [8, 4])
    assert worker.take_stats() == {"a": (8, 2 * 2 * 3), "b": (4, 2 * 2 * 1)}
    assert worker.take_stats() == {}


def test_layers_that_fall_back_count_nothing() -> None:
    worker = tracker()
    fallen: list[tuple[str, int]] = []
    worker.fell_back = lambda reason, rows: fallen.append((reason, rows))  # type: ignore[method-assign]
    with worker.step(scheduled(new("a", 2, computed=2)), lambda: ["a"]):
        assert plan(worker, [1], "softcap") is None
    assert worker.take_stats() == {}
    assert fallen == [("softcap", 1)]


class Slow:
    """A `Readback` from a device that is behind."""

    done = 0
    started = 0
    waited_for = 0

    def __init__(self, visited: torch.Tensor) -> None:
        self.number = Slow.started
        Slow.started += 1
        self.copied = visited.clone()

    def arrived(self) -> bool:
        return self.number < Slow.done

    def values(self) -> list[int]:
        Slow.waited_for += not self.arrived()
        return self.copied.tolist()


@given(st.lists(st.integers(0, 3), max_size=12))
def test_steps_are_counted_once_when_the_device_is_done(progress: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "Readback", Slow)
        Slow.done = Slow.started = Slow.waited_for = 0
        worker = tracker()
        for number, more in enumerate(progress):
            Slow.done = min(Slow.done + more, number + 1)  # also what is launched now may be done at once
            visit(worker, [new("a", 2, computed=2)], [1])
            counted = worker.stats["a"].visited if worker.stats else 0
            assert counted == Slow.done
            assert Slow.waited_for == 0
        steps_taken = len(progress)
        assert worker.take_stats() == ({"a": (steps_taken, 4 * steps_taken)} if progress else {})
        assert Slow.waited_for == steps_taken - Slow.done


def test_the_memory_of_ended_requests_is_bounded(monkeypatch: Any) -> None:
    monkeypatch.setattr(steps, "MAX_KEPT_REQUESTS", 3)
    worker = tracker()
    for number in range(10):
        visit(worker, [new(f"request-{number}", 1, computed=1)], [1])
        with worker.step(scheduled(finished=(f"request-{number}",)), list):
            pass
    assert list(worker.stats) == ["request-7", "request-8", "request-9"]
    assert worker.table.active_slots == 0


def test_bytes_of_state_are_counted_once_with_summaries_that_layers_share(tmp_path: Path) -> None:
    layers = [state.LayerState(slots=5, kv_heads=2, max_tokens=1000) for _ in range(2)]
    keys = torch.zeros(7, 32, 2, 8)
    for layer in layers:
        layer.summaries_of(keys)
    masks, summaries = 2 * layers[0].mask.nbytes, layers[0].summaries_of(keys).nbytes
    assert state.memory_bytes(layers) == masks + summaries
    counters = StepCounters.create(tmp_path / "worker", slots=4)
    worker = StepTracker(ServerOptions(), 5, counters)
    worker.count_memory(lambda: state.memory_bytes(layers))
    worker.count_memory(lambda: 0)
    assert counters.read().state_bytes == masks + summaries
