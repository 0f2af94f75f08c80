"""The request table against a naive model, under everything that a scheduler may do."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from lite_attention.backend.requests import SCRATCH_SLOT, DecodeToken, RequestTable
from lite_attention.serving.params import DENSE, RequestOptions

SLOTS = 4

options_strategy = st.builds(
    RequestOptions,
    threshold=st.one_of(st.floats(-20, 0), st.just(-math.inf)),
    enable=st.booleans(),
    refresh_interval=st.integers(0, 4),
    warmup_steps=st.integers(0, 3),
    profile=st.sampled_from([None, "careful", "fast"]),
)


def options(threshold: float = -6.0, refresh_interval: int = 0, warmup_steps: int = 0) -> RequestOptions:
    return RequestOptions(
        threshold=threshold, enable=True, refresh_interval=refresh_interval, warmup_steps=warmup_steps
    )


@dataclass
class Known:
    """What a naive reader of the rules knows of a request."""

    options: RequestOptions
    prompt_tokens: int
    position: int = 0  # next token to compute
    seen: list[int] = field(default_factory=list)  # positions computed since the state was lost
    slot: int | None = None


class Scheduling(RuleBasedStateMachine):
    """Requests start, prefill in chunks, decode in changing batches, are preempted, resume, end and come again."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.table = RequestTable(SLOTS)
        self.known: dict[str, Known] = {}
        self.names = 0

    @rule(target=requests, options=options_strategy, prompt_tokens=st.integers(1, 5))
    def start(self, options: RequestOptions, prompt_tokens: int) -> str:
        name = f"request-{self.names}"
        self.names += 1
        self.table.start(name, options, prompt_tokens)
        self.known[name] = Known(options, prompt_tokens)
        return name

    @rule(name=requests, more=st.integers(1, 3))
    def start_again_with_a_longer_prompt(self, name: str, more: int) -> None:
        known = self.known[name]
        self.known[name] = Known(known.options, known.prompt_tokens + more, known.position)
        self.table.start(name, known.options, known.prompt_tokens + more)

    @rule(name=requests, resume_at=st.integers(0, 8))
    def preempt(self, name: str, resume_at: int) -> None:
        known = self.known[name]
        self.table.preempt(name)
        known.position, known.seen, known.slot = min(resume_at, known.prompt_tokens), [], None

    @rule(name=consumes(requests))
    def finish(self, name: str) -> None:
        self.table.finish(name)
        del self.known[name]

    @rule()
    def events_of_unknown_requests(self) -> None:
        self.table.finish("nobody")
        self.table.preempt("nobody")
        assert self.table.skips_from("nobody") is None

    @rule(names=st.lists(requests, max_size=SLOTS - 1, unique=True), chunk=st.integers(1, 4))
    def step(self, names: list[str], chunk: int) -> None:
        batch = [name for name in names if name in self.known]
        used: dict[int, str] = {}
        for name in batch:
            known = self.known[name]
            first = self.table.skips_from(name)
            skips = known.options.enable and known.options.threshold > -math.inf
            assert first == (known.prompt_tokens if skips else None)
            for position in range(known.position, known.position + chunk):
                if first is None or position < first:
                    continue
                token = self.table.decode_token(name, position, batch)
                self.check(name, known, position, token)
                assert used.setdefault(token.slot, name) == name, "two requests of one step share a slot"
            known.position += chunk

    def check(self, name: str, known: Known, position: int, token: DecodeToken) -> None:
        evicted = known.slot is not None and self.holder(known.slot) != name
        if evicted or token.slot != known.slot:
            known.seen = []
        known.slot = token.slot
        number = position - known.prompt_tokens
        interval = known.options.refresh_interval
        dense_step = number < known.options.warmup_steps or bool(interval and number % interval == 0)
        continues = bool(known.seen) and known.seen[-1] == position - 1
        if not continues:
            assert token.visit_all, "state of another sequence or of another position would be used"
        elif not evicted:
            assert token.visit_all == dense_step
        known.seen.append(position)
        assert token.slot != SCRATCH_SLOT
        assert (token.request_id, token.position) == (name, position)
        assert (token.threshold, token.profile) == (known.options.threshold, known.options.profile)

    def holder(self, slot: int) -> str | None:
        owners = [name for name, request in self.table._requests.items() if request.slot == slot]
        return owners[0] if owners else None

    @invariant()
    def every_slot_is_free_or_held_once(self) -> None:
        held = [request.slot for request in self.table._requests.values() if request.slot is not None]
        assert sorted(held + self.table._free) == list(range(1, SLOTS))
        assert self.table.active_slots == len(held)

    @invariant()
    def nothing_is_remembered_of_ended_requests(self) -> None:
        assert set(self.table._requests) == set(self.known)


Scheduling.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestScheduling = Scheduling.TestCase


def test_a_preempted_request_computes_its_tokens_the_same_way_again() -> None:
    table = RequestTable(SLOTS)
    table.start("a", options(refresh_interval=3, warmup_steps=2), prompt_tokens=10)
    first = [table.decode_token("a", position, ["a"]) for position in range(10, 20)]
    table.preempt("a")
    table.start("b", options(), 1)
    table.decode_token("b", 1, ["b"])
    again = [table.decode_token("a", position, ["a", "b"]) for position in range(10, 20)]
    assert [token.visit_all for token in again] == [token.visit_all for token in first]
    assert [token.visit_all for token in first] == [n < 2 or n % 3 == 0 for n in range(10)]


def test_a_gap_in_the_positions_resets() -> None:
    table = RequestTable(SLOTS)
    table.start("a", options(), prompt_tokens=2)
    assert [table.decode_token("a", position, ["a"]).visit_all for position in (2, 3, 5, 6, 6)] == [
        True,
        False,
        True,
        False,
        True,
    ]


def test_the_slot_of_an_idle_request_is_taken_when_none_is_free() -> None:
    table = RequestTable(3)
    for name in "abc":
        table.start(name, options(), 1)
    slot = table.decode_token("a", 1, ["a"]).slot
    table.decode_token("b", 1, ["b"])
    assert table.decode_token("c", 1, ["b", "c"]).slot == slot
    assert table.decode_token("b", 2, ["b", "c"]).visit_all is False
    assert table.decode_token("a", 2, ["a"]).visit_all is True


def test_dense_requests_hold_no_slot() -> None:
    table = RequestTable(SLOTS)
    table.start("a", DENSE, 1)
    table.start("b", options(-math.inf), 1)
    assert table.skips_from("a") is None
    assert table.skips_from("b") is None
    with pytest.raises(ValueError, match="position: expected a decode token"):
        table.decode_token("b", 1, ["b"])
    assert table.active_slots == 0


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"slots: expected at least 2 .* got 1"):
        RequestTable(1)
    table = RequestTable(2)
    for name in "ab":
        table.start(name, options(), 1)
    table.decode_token("a", 1, ["a", "b"])
    with pytest.raises(RuntimeError, match="slots: 1 are too few"):
        table.decode_token("b", 1, ["a", "b"])
