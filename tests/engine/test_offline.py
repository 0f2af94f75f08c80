"""LITE_ATTN inside a real engine with a real model, without a server."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest

from lite_attention.tiles import DECODE_BLOCK, ceil_div
from tests.engine.conftest import Job

DENSE: dict[str, Any] = {"lite_attn_enable": False}


def skipping(threshold: float, **options: Any) -> dict[str, Any]:
    return {"lite_attn_threshold": threshold} | {f"lite_attn_{name}": value for name, value in options.items()}


@pytest.fixture
def without_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock attention in the vector layout, as LITE_ATTN has it: for AMX it has another, and is rounded differently."""
    from vllm.v1.attention.backends import cpu_attn

    choose = cpu_attn._get_attn_isa

    def chosen(*args: Any, **kwargs: Any) -> str:
        isa: str = choose(*args, **kwargs)
        return "vec" if isa == "amx" else isa

    monkeypatch.setattr(cpu_attn, "_get_attn_isa", chosen)


@pytest.mark.usefixtures("without_amx")
def test_requests_that_do_not_skip_get_the_tokens_of_stock_attention(engine: Callable[..., Any]) -> None:
    lengths = (20, 33, 127, 300, 700, 1500, 3000, 6000)
    with engine("CPU_ATTN", max_model_len=8192) as stock:
        # The second time prompts come from the prefix cache, and products of fewer rows are rounded differently.
        want, again = (stock.tokens([Job(n, {}) for n in lengths]) for _ in range(2))
    with engine("LITE_ATTN", max_model_len=8192) as lite:
        assert lite.tokens([Job(n, DENSE) for n in lengths]) == want
        assert lite.tokens([Job(n, skipping(-math.inf)) for n in lengths]) == again
        assert lite.tracker.table.active_slots == 0


def test_outputs_say_their_sparsity_and_lower_thresholds_skip_less(engine: Callable[..., Any]) -> None:
    with engine("LITE_ATTN") as lite:
        thresholds = (-2, -6, -12)
        jobs = [Job(1200, skipping(t)) for t in thresholds] + [Job(1200, DENSE), Job(40, skipping(10))]
        outputs = lite.generate(jobs)
        sparsity = [output.lite_attn["sparsity"] for output in outputs]
        assert 0.5 < sparsity[0] > sparsity[1] > sparsity[2] > 0
        assert sparsity[3] is None
        layers_and_heads = 30 * 3
        blocks = sum(ceil_div(1200 + n, DECODE_BLOCK) for n in range(1, 24))
        assert outputs[0].lite_attn["blocks_total"] == layers_and_heads * blocks

        dense_start = lite.generate([Job(1200, skipping(-2, warmup_steps=24))])[0]
        assert dense_start.lite_attn["sparsity"] == 0
        refreshed = lite.generate([Job(1200, skipping(-2, refresh_interval=4))])[0]
        assert 0 < refreshed.lite_attn["sparsity"] < sparsity[0]


def mixed_jobs(*thresholds: float | None) -> list[Job]:
    """Sixteen requests with these thresholds in turn, None for a dense one."""
    return [
        Job(
            prompt_tokens=60 + 37 * place,
            options=DENSE if threshold is None else skipping(threshold, refresh_interval=place % 3 * 5),
            max_tokens=40,
            start=150 * place,
        )
        for place, threshold in zip(range(16), itertools.cycle(thresholds), strict=False)
    ]


def test_no_request_changes_the_tokens_of_another(engine: Callable[..., Any]) -> None:
    """Sixteen requests, from dense to reckless, in a cache too small for them, two of them aborted."""
    jobs = mixed_jobs(-2, -4, -6, -8, None)
    settings = {"dtype": "float32", "block_size": 32, "max_num_batched_tokens": 256, "num_gpu_blocks_override": 90}
    with engine("LITE_ATTN", **settings) as lite:
        alone = [lite.tokens([job])[0] for job in jobs]
        preempted = count_preemptions(lite)
        together = lite.tokens(jobs, abort={3: 30, 10: 40})
        assert preempted() > 0
        for place in set(range(16)) - {3, 10}:
            assert together[place] == alone[place], f"request {place} of {jobs[place]}"
        for place in (3, 10):
            assert together[place] == alone[place][: len(together[place])]
        lite.tokens([Job(20, DENSE, max_tokens=1)])  # the step in which the worker hears of the last ends
        assert lite.tracker.table.active_slots == 0


def count_preemptions(lite: Any) -> Callable[[], int]:
    """Preemptions that the worker heard of from now on."""
    table, seen = lite.tracker.table, []
    original = table.preempt

    def preempt(request_id: str) -> None:
        request = table._requests.get(request_id)
        seen.extend([request_id] * (request is not None and request.slot is not None))
        original(request_id)

    finish = table.finish

    def without_counting(request_id: str) -> None:
        before = len(seen)
        finish(request_id)
        del seen[before:]

    table.preempt, table.finish = preempt, without_counting
    return lambda: len(seen)


def test_keys_computed_under_skipping_are_not_shared_as_a_prefix(engine: Callable[..., Any]) -> None:
    settings = {"dtype": "float32", "block_size": 32, "enable_prefix_caching": True}
    with engine("LITE_ATTN", **settings) as lite:
        prompt = lite.prompt(Job(320, {}))["prompt_token_ids"]
        reckless = Job(320, skipping(-1), max_tokens=100)
        answer = lite.tokens([reckless])[0]
        params = lite.params(Job(0, DENSE, max_tokens=8))
        follow_up: Any = {"prompt_token_ids": prompt + answer + prompt[:40]}
        output = lite.llm.generate([follow_up], params, use_tqdm=False)[0]
        assert output.num_cached_tokens == 320
        lite.llm.reset_prefix_cache()
        fresh = lite.llm.generate([follow_up], params, use_tqdm=False)[0]
        assert fresh.num_cached_tokens == 0
        assert fresh.outputs[0].token_ids == output.outputs[0].token_ids


def test_bad_options_are_refused_and_the_engine_goes_on(engine: Callable[..., Any]) -> None:
    with engine("LITE_ATTN", additional_config={"lite_attn": {"threshold": -5, "max_threshold": -3}}) as lite:
        for options, message in (
            ({"lite_attn_threshold": "hot"}, "lite_attn_threshold: expected a number"),
            ({"lite_attn_threshold": math.nan}, "lite_attn_threshold: expected a number"),
            ({"lite_attn_threshold": -2}, "lite_attn_threshold: expected at most -3"),
            ({"lite_attn_treshold": -4}, "lite_attn_treshold: unknown"),
        ):
            with pytest.raises(ValueError, match=message):
                lite.generate([Job(20, options)])
        output = lite.generate([Job(600, {})])[0]
        assert output.lite_attn["sparsity"] > 0


def test_what_cannot_skip_runs_stock_attention_and_is_counted(engine: Callable[..., Any]) -> None:
    with engine("LITE_ATTN", kv_cache_dtype="fp8", dtype="bfloat16") as lite:
        counted: list[tuple[str, int]] = []
        lite.tokens([Job(20, DENSE)])
        lite.tracker.fell_back = lambda reason, rows: counted.append((reason, rows))
        output = lite.generate([Job(100, skipping(-4), max_tokens=4)])[0]
        assert output.lite_attn["sparsity"] is None
        assert len(output.outputs[0].token_ids) == 4
        assert set(counted) == {("kv_cache_dtype", 1)}
