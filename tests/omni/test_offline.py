"""LITE_ATTN in vLLM-Omni's engine: what it computes, for whom, and what it leaves behind."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY

from lite_attention.backend.omni.pool import StatePool
from lite_attention.state import SkipState
from lite_attention.tiles import BLOCK_K, TILE_Q, ceil_div
from tests.omni.conftest import DTYPE, OLD, STOCK, TOKENS, Engine, latents, looks_inside
from tests.omni.tiny import HEADS, LAYERS, STEPS

ROUNDING = 1e-4 if DTYPE == "float32" else 0.1
"""How far rows of a batch may be from what they are alone, and we from stock attention, in latents of about 1."""

TILES, BLOCKS = ceil_div(TOKENS, TILE_Q), ceil_div(TOKENS, BLOCK_K)

RISING = {"threshold": -3.0, "threshold_rise": 2.5}
OFF = {"enable": False}
STRONG = {"threshold": -1.0}
WEAK = {"threshold": -3.0}


def pools() -> list[StatePool]:
    gc.collect()
    return [thing for thing in gc.get_objects() if isinstance(thing, StatePool)]


def states() -> int:
    """States that requests hold; there are no others than those of pools."""
    made = sum(isinstance(thing, SkipState) for thing in gc.get_objects())
    assert made == sum(len(shelf.states) for pool in pools() for shelf in pool._shelves.values())
    return sum(pool.in_use for pool in pools())


@pytest.fixture(scope="module", params=[1, 2], ids=["one-expert", "two-experts"])
def experts(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def stock(engine: Callable[..., Any], experts: int) -> dict[float, torch.Tensor]:
    """Stock videos by guidance scale."""
    with engine(experts, STOCK) as running:
        return {scale: latents(*running.run({"guidance_scale": scale})) for scale in (1.0, 3.0)}


@pytest.fixture(scope="module")
def running(engine: Callable[..., Any], experts: int, stock: Any) -> Iterator[Engine]:
    batches = {} if OLD else {"max_num_seqs": 2, "request_batch_max_wait_ms": 300}
    with engine(experts, **batches) as started:
        yield started


@pytest.mark.parametrize("scale", [1.0, 3.0], ids=["no guidance", "guidance"])
@pytest.mark.parametrize(
    "off",
    [
        OFF,
        {"threshold": -math.inf},
        {"threshold": -math.inf, "threshold_rise": 4},
        {"warmup_steps": STEPS},
        {"cooldown_steps": STEPS},
    ],
)
def test_off_is_stock_bit_for_bit(running: Engine, stock: Any, scale: float, off: dict[str, Any]) -> None:
    (output,) = running.run({"guidance_scale": scale, "lite_attn": off})
    assert torch.equal(latents(output), stock[scale])


@pytest.mark.parametrize("scale", [1.0, 3.0], ids=["no guidance", "guidance"])
def test_skipping_changes_little_and_says_how_much(
    running: Engine, stock: Any, scale: float, record_property: Callable[[str, object], None]
) -> None:
    found = []
    for options in (STRONG, WEAK, {"threshold": -100.0}):
        (output,) = running.run({"guidance_scale": scale, "lite_attn": options})
        found.append((output.custom_output["lite_attn"]["sparsity"], latents(output)))
    (strong, far), (weak, near), (none, same) = found
    record_property("skipped", [strong, weak, none])
    record_property("differences", [float((video - stock[scale]).abs().max()) for _, video in found])
    assert strong > weak >= none == 0
    assert strong > 0.05
    torch.testing.assert_close(same, stock[scale], rtol=0, atol=ROUNDING)
    if DTYPE == "float32":  # else rounding is as large as what skipping changes
        assert (far - stock[scale]).abs().max() > (near - stock[scale]).abs().max()
    total = (2 if scale > 1 else 1) * STEPS * LAYERS * HEADS * TILES * BLOCKS
    assert output.custom_output["lite_attn"]["blocks_total"] == total


def test_a_threshold_that_rises_skips_more_in_late_steps(running: Engine) -> None:
    def skipped(options: dict[str, Any]) -> float:
        (output,) = running.run({"lite_attn": options})
        said = output.custom_output["lite_attn"]
        return float(said["blocks_total"] - said["blocks_visited"])

    (flat,), (same,) = (running.run({"lite_attn": options}) for options in (WEAK, WEAK | {"threshold_rise": 0}))
    assert torch.equal(latents(same), latents(flat))
    # A cool-down leaves the early steps, which rise as they do without it.
    early = {"cooldown_steps": STEPS // 2}
    more, more_early = skipped(RISING) - skipped(WEAK), skipped(RISING | early) - skipped(WEAK | early)
    assert more - more_early > more_early >= 0


@looks_inside
@pytest.mark.parametrize("dense", [{}, {"warmup_steps": 2, "cooldown_steps": 1}], ids=["all steps", "not at the ends"])
def test_a_threshold_that_rises_equals_thresholds_by_step(
    running: Engine, monkeypatch: pytest.MonkeyPatch, dense: dict[str, int]
) -> None:
    from lite_attention.backend.omni import execution

    (output,) = running.run({"lite_attn": RISING | dense})
    state_at = execution.state_at

    def at_step(states: Any, key: Any, step: int, make: Callable[[], Any]) -> Any:
        attention = state_at(states, key, step, make)
        attention.step = step
        return attention

    def by_steps(*given: Any) -> Any:
        asked.add(given)
        return schedule

    schedule = {step: -3.0 + 0.5 * step for step in range(STEPS)}
    asked: set[Any] = set()
    monkeypatch.setattr(execution, "state_at", at_step)
    monkeypatch.setattr(execution, "risen", by_steps)
    (by_step,) = running.run({"lite_attn": RISING | dense})
    # The last two steps of a warm-up learn with the thresholds of their own.
    deciding = range(max(dense.get("warmup_steps", 0) - 2, 0), STEPS - dense.get("cooldown_steps", 0))
    assert asked == {(-3.0, 2.5, step, STEPS, False) for step in deciding}
    assert torch.equal(latents(output), latents(by_step))
    assert output.custom_output["lite_attn"] == by_step.custom_output["lite_attn"]


def test_requests_one_after_another_do_not_touch_each_other(running: Engine) -> None:
    alone = [latents(*running.run({"lite_attn": options})) for options in (STRONG, WEAK)]
    for _ in range(2):
        for options, want in zip((STRONG, WEAK), alone, strict=True):
            assert torch.equal(latents(*running.run({"lite_attn": options})), want)
    assert not torch.equal(*alone)


@looks_inside
def test_rows_of_a_batch_keep_their_options(running: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_omni.diffusion.worker.diffusion_model_runner import DiffusionModelRunner

    sizes = []
    inner = DiffusionModelRunner._execute_request_list

    def counted(self: Any, reqs: list[Any], **kwargs: Any) -> Any:
        sizes.append(len(reqs))
        return inner(self, reqs, **kwargs)

    monkeypatch.setattr(DiffusionModelRunner, "_execute_request_list", counted)
    later = {"threshold": -1.0, "warmup_steps": 2, "refresh_interval": 2}
    for pair in ((STRONG, WEAK), (OFF, STRONG), (WEAK, later), (RISING, WEAK)):
        jobs = [{"seed": seed, "lite_attn": options} for seed, options in enumerate(pair)]
        alone = [running.run(job)[0] for job in jobs]
        sizes.clear()
        together = running.run(*jobs)
        assert sizes == [2]
        for got, want in zip(together, alone, strict=True):
            torch.testing.assert_close(latents(got), latents(want), rtol=0, atol=ROUNDING)
            assert got.custom_output["lite_attn"] == want.custom_output["lite_attn"]


def test_a_bad_option_is_a_client_error_and_harms_nobody(running: Engine) -> None:
    want = latents(*running.run({"lite_attn": STRONG}))
    bad: list[tuple[Any, str]] = [
        ({"threshold": "hot"}, "lite_attn.threshold"),
        ({"warmup_steps": -1}, "lite_attn.warmup_steps"),
        ({"cooldown_steps": 1.5}, "lite_attn.cooldown_steps"),
        ({"threshold_rise": -1}, "lite_attn.threshold_rise"),
        ({"banana": 1}, "lite_attn.banana"),
        ("on", "lite_attn: expected a table"),
    ]
    for options, named in bad:
        good, refused = running.run({"lite_attn": STRONG}, {"lite_attn": options})
        assert getattr(refused, "status_code", None) == 400, refused
        assert named in str(refused)
        torch.testing.assert_close(latents(good), want, rtol=0, atol=ROUNDING)


@looks_inside
def test_nothing_is_left_after_a_request_an_abort_or_a_failure(
    running: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = latents(*running.run({"lite_attn": STRONG}))
    assert states() == 0
    (aborted,) = running.run({"lite_attn": STRONG, "num_inference_steps": 30}, abort=0)
    assert aborted is None or isinstance(aborted, BaseException) or not aborted.images
    assert torch.equal(latents(*running.run({"lite_attn": STRONG})), want)
    assert states() == 0

    from vllm_omni.diffusion.models.wan2_2.pipeline_wan2_2 import Wan22Pipeline

    seen = []

    def fails(self: Any, step: int, *args: Any, **kwargs: Any) -> None:
        if step == 3:
            seen.append(states())
            raise RuntimeError("a failure in the middle")

    with monkeypatch.context() as patched:
        patched.setattr(Wan22Pipeline, "record_denoise_step", fails)
        (failed,) = running.run({"lite_attn": STRONG})
    assert "a failure in the middle" in str(failed)
    assert seen[0] > 0 and states() == 0
    assert torch.equal(latents(*running.run({"lite_attn": STRONG})), want)


def test_metrics_say_what_was_skipped_and_what_memory_it_takes(
    running: Engine, experts: int, record_property: Callable[[str, object], None]
) -> None:
    def metric(name: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(name, labels) or 0.0

    running.run({"lite_attn": OFF})
    before = metric("lite_attn_blocks_total", threshold="-3"), metric("lite_attn_blocks_visited_total", threshold="-3")
    (output,) = running.run({"lite_attn": WEAK})
    said = output.custom_output["lite_attn"]
    assert metric("lite_attn_blocks_total", threshold="-3") - before[0] == said["blocks_total"]
    assert metric("lite_attn_blocks_visited_total", threshold="-3") - before[1] == said["blocks_visited"]
    state = LAYERS * 2 * experts * HEADS * TILES * ceil_div(BLOCKS, 32) * 4  # 2 branches
    record_property("state bytes", state)
    assert metric("lite_attn_state_bytes") == state
    running.run({"lite_attn": STRONG, "num_inference_steps": 30}, abort=0)
    running.run({"lite_attn": OFF})
    assert metric("lite_attn_active_slots") == metric("lite_attn_state_bytes") == 0


@looks_inside
def test_memory_is_used_again_and_counted(running: Engine, experts: int) -> None:
    from lite_attention.backend.vllm.plugin import metrics_directory
    from lite_attention.serving.metrics import read_directory

    (pool,) = pools()

    def memory() -> dict[int, int]:
        return {state.mask.data_ptr(): state.mask.nbytes for shelf in pool._shelves.values() for state in shelf.states}

    running.run({"lite_attn": STRONG})
    first = memory()
    assert len(first) == 2 * 2 * experts  # layers, branches, experts
    assert sum(first.values()) == pool.memory_bytes == read_directory(metrics_directory()).state_bytes
    running.run({"lite_attn": WEAK})
    assert memory() == first
    running.run({"lite_attn": STRONG, "guidance_scale": 1.0})
    assert memory().items() < first.items() and len(memory()) == len(first) // 2
    running.run({"lite_attn": OFF})
    assert not memory() and read_directory(metrics_directory()).state_bytes == 0


@looks_inside
def test_experts_and_branches_have_states_of_their_own(running: Engine, experts: int) -> None:
    from lite_attention.backend.omni import execution

    made = []
    make = execution.Request.make

    def counted(self: Any, *arguments: Any) -> Any:
        made.append(self.request_id)
        return make(self, *arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(execution.Request, "make", counted)
        running.run({"lite_attn": STRONG})
    assert len(made) == 2 * 2 * experts  # layers, branches, experts


def test_ring_parallelism_is_refused(running: Engine) -> None:
    from types import SimpleNamespace

    from lite_attention.backend.omni import attention

    config = SimpleNamespace(parallel_config=SimpleNamespace(ring_degree=2))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(attention, "get_current_diffusion_config_or_none", lambda: config)
        with pytest.raises(ValueError, match="does not support ring parallelism"):
            attention.LiteAttentionImpl(2, 24, 0.2)
