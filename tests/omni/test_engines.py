"""What needs an engine of its own: compiled blocks, a transformer that is not known. One engine at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.omni.conftest import latents
from tests.omni.test_offline import OFF, ROUNDING, STRONG


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
