"""LiteAttention in a pipeline of diffusers on a Hopper GPU, in bfloat16: stock restored, CPU offload, compiling."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

diffusers = pytest.importorskip("diffusers")

from lite_attention.backend.diffusers import disable, enable  # noqa: E402
from tests.diffusers.conftest import STEPS, TEXT, make_pipeline  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

SIZE = {"height": 512, "width": 512, "num_frames": 33}
"""9,216 tokens."""
ROUNDING = 0.1
"""How far PyTorch's attention and ours may be apart in latents of about 1, bfloat16, after a whole generation."""

Record = Callable[[str, object], None]


def wan(experts: int = 1) -> Any:
    pipeline = make_pipeline(experts)
    for name in ("transformer", "transformer_2"):
        if getattr(pipeline, name, None) is not None:
            getattr(pipeline, name).to(torch.bfloat16)
    return pipeline


def generate(pipeline: Any, seed: int = 0) -> Tensor:
    """Latents of a video, on the CPU."""
    noise = torch.Generator().manual_seed(seed)
    prompt, negative = torch.randn(2, 1, TEXT, 32, generator=noise).to("cuda", torch.bfloat16).unbind(0)
    return pipeline(  # type: ignore[no-any-return]
        prompt_embeds=prompt,
        negative_prompt_embeds=negative,
        generator=noise,
        guidance_scale=3.0,
        num_inference_steps=STEPS,
        output_type="latent",
        **SIZE,
    ).frames.cpu()


@pytest.mark.parametrize("experts", [1, 2])
def test_stock_attention_comes_back_bit_for_bit(experts: int, record_property: Record, tmp_path: Path) -> None:
    pipeline = wan(experts).to("cuda")
    stock = generate(pipeline)
    report = enable(pipeline, threshold=-math.inf)
    dense = generate(pipeline)
    assert report.mean_sparsity == 0 and not report.reasons
    report = enable(pipeline, threshold=-1.0)
    skipping = generate(pipeline)
    assert 0.05 < report.mean_sparsity < 1 and not report.reasons
    report.save(tmp_path / "wan.trace")
    disable(pipeline)
    assert torch.equal(generate(pipeline), stock)
    record_property("skipped", report.mean_sparsity)
    record_property("differences", [float((video - stock).abs().max()) for video in (dense, skipping)])
    torch.testing.assert_close(dense, stock, rtol=0, atol=ROUNDING)


def offload_model(pipeline: Any) -> None:
    pytest.importorskip("accelerate")
    pipeline.enable_model_cpu_offload()


def offload_layers(pipeline: Any) -> None:
    pytest.importorskip("accelerate")
    pipeline.enable_sequential_cpu_offload()


def offload_groups(pipeline: Any) -> None:
    from diffusers.hooks import apply_group_offloading

    places = {"onload_device": torch.device("cuda"), "offload_device": torch.device("cpu")}
    apply_group_offloading(pipeline.transformer, **places, offload_type="block_level", num_blocks_per_group=1)


@pytest.mark.parametrize("offload", [offload_model, offload_layers, offload_groups])
@pytest.mark.parametrize("first", ["offload first", "enable first"])
def test_cpu_offload_changes_nothing(offload: Callable[[Any], None], first: str, record_property: Record) -> None:
    pipeline = wan().to("cuda")
    stock = generate(pipeline)
    enable(pipeline, threshold=-1.0)
    want = [generate(pipeline, seed) for seed in (1, 2)]
    disable(pipeline)

    pipeline = wan()
    if first == "offload first":
        offload(pipeline)
    report = enable(pipeline, threshold=-1.0)
    if first == "enable first":
        offload(pipeline)
    got = [generate(pipeline, seed) for seed in (1, 2)]
    record_property("skipped", report.mean_sparsity)
    assert all(map(torch.equal, got, want)) and report.mean_sparsity > 0.05
    disable(pipeline)
    assert torch.equal(generate(pipeline), stock)


@pytest.mark.parametrize("how", ["the transformer", "its blocks"])
def test_compiled_transformers_skip(how: str, record_property: Record) -> None:
    pipeline = wan().to("cuda")
    enable(pipeline, threshold=-1.0)
    want = generate(pipeline)
    disable(pipeline)
    if how == "the transformer":
        pipeline.transformer = torch.compile(pipeline.transformer)
    else:
        pipeline.transformer.compile_repeated_blocks()
    stock = generate(pipeline)
    report = enable(pipeline, threshold=-1.0)
    got = generate(pipeline)
    disable(pipeline)
    record_property("skipped", report.mean_sparsity)
    record_property("difference", float((got - want).abs().max()))
    assert report.mean_sparsity > 0.05
    assert torch.equal(generate(pipeline), stock)
