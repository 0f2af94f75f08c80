"""What needs an engine of its own: compiled blocks, a transformer that is not known. One engine at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY

from tests.omni.conftest import GPU, cpu_only, latents, looks_inside
from tests.omni.test_offline import OFF, ROUNDING, STRONG


@looks_inside
def test_compiled_blocks_skip_alike_without_graph_breaks(engine: Callable[..., Any]) -> None:
    from torch._dynamo.utils import counters

    with engine() as running:
        want = [latents(*running.run({"lite_attn": options})) for options in (STRONG, OFF)]
    counters.clear()
    with engine(enforce_eager=False) as running:
        got = [latents(*running.run({"lite_attn": options})) for options in (STRONG, OFF)]
    assert not counters["graph_break"]
    assert 0 < counters["stats"]["unique_graphs"] <= 3
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=ROUNDING)


@cpu_only
def test_workers_in_processes_of_their_own_say_and_count_what_was_skipped(engine: Callable[..., Any]) -> None:
    # As with several GPUs. On one GPU, vLLM-Omni 0.26 has such a worker, and test_offline.py runs with it.
    with engine(distributed_executor_backend="mp") as running:
        (output,) = running.run({"lite_attn": {"threshold": -2.0}})
        counted = REGISTRY.get_sample_value("lite_attn_blocks_total", {"threshold": "-2"})
        (refused,) = running.run({"lite_attn": {"threshold": "hot"}})
    skipped = output.custom_output["lite_attn"]
    assert 0 < skipped["sparsity"] < 1
    assert counted == skipped["blocks_total"]
    assert getattr(refused, "status_code", None) == 400 and "lite_attn.threshold" in str(refused)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="vLLM-Omni offloads from GPUs")
def test_offload_changes_nothing(engine: Callable[..., Any]) -> None:
    found = []
    for settings in ({}, {"enable_cpu_offload": True}, {"enable_layerwise_offload": True}):
        with engine(**settings) as running:
            (output,) = running.run({"lite_attn": STRONG})
        found.append((latents(output), output.custom_output["lite_attn"]))
    (want, said), *others = found
    assert said["sparsity"] > 0.05
    assert all(torch.equal(video, want) and skipped == said for video, skipped in others)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="vLLM-Omni's sleep is for GPUs")
def test_a_sleeping_engine_keeps_no_states(engine: Callable[..., Any]) -> None:
    def state_bytes() -> float:
        return REGISTRY.get_sample_value("lite_attn_state_bytes") or 0.0

    with engine(enable_sleep_mode=True) as running:
        want = latents(*running.run({"lite_attn": STRONG}))
        assert state_bytes() > 0
        running.loop.run_until_complete(running.omni.sleep(level=1))
        assert state_bytes() == 0
        running.loop.run_until_complete(running.omni.wake_up())
        assert torch.equal(latents(*running.run({"lite_attn": STRONG})), want)


@looks_inside
def test_an_unknown_transformer_is_dense_and_says_so(
    engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine(backend="TORCH_SDPA") as running:
        stock = latents(*running.run({}))
    from lite_attention.backend.omni import execution, models

    said: list[str] = []
    monkeypatch.setattr(models, "FAMILIES", {})
    monkeypatch.setattr(execution, "say_once", said.append)
    with engine() as running:
        (output,) = running.run({"lite_attn": STRONG})
    assert torch.equal(latents(output), stock)
    assert said == ["Wan22Pipeline has no transformer that it knows"]
    assert output.custom_output["lite_attn"]["sparsity"] is None
