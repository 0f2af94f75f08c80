"""LITE_ATTN inside a real engine with a real model, without a server."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lite_attention.costs import DecodeShape
from lite_attention.tiles import DECODE_BLOCK, ceil_div
from tests.engine.conftest import Job
from tests.profiles import make_profile

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


def layers(count: int) -> list[str]:
    return [f"model.layers.{number}.self_attn.attn" for number in range(count)]


LAYERS = layers(30)


def save_profile(path: Path, by_layer: list[float], **more: Any) -> str:
    """A profile, for the model of these tests unless `more` says else, as the server is told of it."""
    smollm2 = {"model": "smollm2", "shape": DecodeShape("LlamaForCausalLM", heads=9, kv_heads=3, head_dim=64)}
    make_profile(dict(zip(layers(len(by_layer)), by_layer, strict=True)), **smollm2 | more).save(path)
    return str(path)


def test_requests_with_profiles_get_together_what_they_get_alone(engine: Callable[..., Any], tmp_path: Path) -> None:
    """Preempted in a cache too small for them, and while a share of their tokens is also computed dense."""
    profiles = {
        "uniform": save_profile(tmp_path / "uniform.toml", [-4.0] * 30),
        "first": save_profile(tmp_path / "first.toml", [-1.0] * 15 + [-math.inf] * 15),
        "last": save_profile(tmp_path / "last.toml", [-9.0] * 15 + [-2.0] * 15, refresh_interval=7),
    }
    lite_attn = {"profiles": profiles, "profile": "last"}
    settings = {"dtype": "float32", "block_size": 32, "max_num_batched_tokens": 256, "num_gpu_blocks_override": 32}
    settings |= {"max_model_len": 900}
    jobs = [
        Job(40 + 23 * place, options, max_tokens=60, start=170 * place)
        for place, options in enumerate(
            [{"lite_attn_profile": name} for name in profiles] + [{}, skipping(-4), DENSE]
            + [{"lite_attn_profile": name} for name in profiles]
        )
    ]  # fmt: skip
    with engine("LITE_ATTN", additional_config={"lite_attn": lite_attn}, **settings) as lite:
        alone = [lite.tokens([job])[0] for job in jobs]
        same_prompt = [Job(500, options, max_tokens=24) for options in ({"lite_attn_profile": "uniform"}, skipping(-4))]
        assert lite.tokens([same_prompt[0]]) == lite.tokens([same_prompt[1]])
        first = lite.generate([Job(850, {"lite_attn_profile": "first"})])[0]
        assert 0.3 < first.lite_attn["sparsity"] < 0.5  # half of the layers read everything
        with pytest.raises(ValueError, match="lite_attn_profile: expected one of uniform, first, last, got 'second'"):
            lite.generate([Job(20, {"lite_attn_profile": "second"})])
    checking = {"lite_attn": lite_attn | {"check_share": 0.5}}
    with engine("LITE_ATTN", additional_config=checking, **settings) as lite:
        lite.tokens([Job(20, DENSE, max_tokens=1)])
        preempted = count_preemptions(lite)
        assert lite.tokens(jobs) == alone
        assert preempted() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": DecodeShape("LlamaForCausalLM", 9, 3, 128)}, "a: calibration: expected .* heads of 128.*got .* 64"),
        ({"thresholds": dict.fromkeys(LAYERS[1:], -4.0)}, "a: calibration: expected the layers of smollm2.*differs in"),
    ],
)
def test_a_profile_for_another_model_is_refused_at_start_up(
    engine: Callable[..., Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    profile = save_profile(tmp_path / "a.toml", [-4.0] * 30, **change)
    with (
        pytest.raises(ValueError, match=message),
        engine("LITE_ATTN", additional_config={"lite_attn": {"profiles": {"a": profile}}}),
    ):
        pass


def test_a_calibration_keeps_its_promise_and_replays_what_was_generated(
    engine: Callable[..., Any], tmp_path: Path
) -> None:
    from lite_attention.backend.vllm import calibration

    with engine("LITE_ATTN", dtype="float32", **calibration.ENGINE_ARGS) as lite:
        prompts = [lite.prompt(Job(400, {}, start=start))["prompt_token_ids"] for start in (0, 2000, 4000)]
        texts = calibration.answer(lite.llm, prompts, max_tokens=24)
        assert [text.prompt_tokens for text in texts] == [400] * 3
        found = calibration.calibrate(lite.llm, texts[:2], "dropped=0.1", model="smollm2", inputs="two")
        assert list(found.thresholds) == LAYERS
        assert found.mean().dropped == pytest.approx(0.1, rel=0.1)
        again = calibration.measure(lite.llm, texts[:2], found)
        assert {name: cost.dropped for name, cost in again.items()} == {
            name: pytest.approx(cost.dropped, rel=0.02) for name, cost in found.reached.items()
        }
        others = calibration.measure(lite.llm, texts[2:], found)
        assert sum(cost.dropped for cost in others.values()) / 30 == pytest.approx(0.1, rel=0.4)
        found.save(tmp_path / "a.toml")
    profiles = {"lite_attn": {"profiles": {"a": str(tmp_path / "a.toml")}, "check_share": 1}}
    settings = calibration.ENGINE_ARGS | {"additional_config": profiles}
    with engine("LITE_ATTN", dtype="float32", **settings) as lite:
        job = Job(400, {"lite_attn_profile": "a"}, max_tokens=30)
        generated = lite.generate([job])[0]
        text = calibration.Text([*prompts[0], *generated.outputs[0].token_ids[:-1]], 400)
        cost = calibration.measure(lite.llm, [text], found)
        replayed = sum(cost.sparsity for cost in cost.values()) / 30
        assert replayed == pytest.approx(generated.lite_attn["sparsity"], abs=2e-3)


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
