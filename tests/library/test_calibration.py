"""Thresholds are found for the cost that was asked for, and their file is read as it was written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lite_attention import LiteAttention
from lite_attention.calibration import (
    HIGHEST,
    LOWEST,
    ROUNDS,
    TOLERANCE,
    Calibration,
    DecodeCalibration,
    Target,
    find,
    search,
)
from lite_attention.costs import Cost, DecodeShape, Meter, Shape
from lite_attention.options import Rule
from lite_attention.ranges import unpack_bits
from lite_attention.tiles import BLOCK_K, TILE_Q

SHAPE = Shape(tokens=512, heads=8, head_dim=32)


def cost_at(error: float) -> Cost:
    return Cost(error=error, dropped=error / 4, sparsity=min(error, 1.0))


CALIBRATION = Calibration(
    model="some/model",
    inputs='a "cat", 30 steps',
    quantity="error",
    target=0.05,
    rule="mass",
    refresh_interval=3,
    shape=SHAPE,
    thresholds={"blocks.0.attn1": -7.25, "blocks.1.attn1": -3.0},
    reached={"blocks.0.attn1": cost_at(0.05), "blocks.1.attn1": cost_at(0.03)},
)


@settings(deadline=None)
@given(
    lines=st.lists(st.tuples(st.floats(0.3, 3.0), st.floats(-12.0, 2.0)), min_size=1, max_size=5),
    wanted=st.floats(0.005, 0.3),
)
def test_the_search_ends_near_the_target_where_costs_grow_evenly(
    lines: list[tuple[float, float]], wanted: float
) -> None:
    """Layers whose error is 2 ** (slope * threshold + offset)."""
    layers = {f"layer {i}": line for i, line in enumerate(lines)}
    runs = 0

    def measure(thresholds: Mapping[str, float]) -> dict[str, Cost]:
        nonlocal runs
        runs += 1
        assert all(LOWEST <= threshold <= HIGHEST for threshold in thresholds.values())
        return {layer: cost_at(2.0 ** (slope * thresholds[layer] + at)) for layer, (slope, at) in layers.items()}

    thresholds, reached = search(measure, layers, Target("error", wanted))
    assert runs <= ROUNDS
    for layer, (slope, at) in layers.items():
        ideal = (math.log2(wanted) - at) / slope
        at_target = reached[layer].error == pytest.approx(wanted, rel=2 * TOLERANCE)
        assert at_target or thresholds[layer] == (HIGHEST if ideal > HIGHEST else LOWEST)
        assert at_target or not LOWEST < ideal < HIGHEST


def attention_inputs(seed: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What a layer sees in six steps: the further a key, the smaller its weight, all of it drifting a little."""
    random = torch.Generator().manual_seed(seed)
    shape = (1, SHAPE.tokens, SHAPE.heads, SHAPE.head_dim)
    angle = torch.linspace(0, math.pi, SHAPE.tokens)[None, :, None].expand(shape[:3])
    reach = torch.linspace(7, 13, SHAPE.heads)
    steps = []
    for _ in range(6):
        query, key, value = torch.randn(3, *shape, generator=random).unbind(0)
        for tensor in (query, key):
            tensor *= 0.5
            tensor[..., 0], tensor[..., 1] = reach * angle.cos(), reach * angle.sin()
        steps.append((query, key, value))
    return steps


def run(layers: Mapping[str, LiteAttention], inputs: list[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Cost]:
    """Each layer sharpens the attention by another factor. Their costs, with a meter of each."""
    meters = {}
    for number, (name, layer) in enumerate(layers.items()):
        layer.meter = meters[name] = layer.meter or Meter()
        for query, key, value in inputs:
            layer(query, key, value, 0.06 + 0.02 * number)
        layer.reset_skip_state()
    return {name: meter.read() for name, meter in meters.items()}


@pytest.mark.parametrize("rule", ["mass", "mass_summaries"])
def test_a_meter_measures_what_the_reference_says(rule: Rule) -> None:
    layer = LiteAttention(-5.0, rule=rule)
    inputs = attention_inputs(0)[:4]
    want, norm, dropped, sparsity = 0.0, 0.0, 0.0, 0.0
    for query, key, value in inputs:
        visits = torch.ones(1, 1, 1, key.shape[1], dtype=torch.bool)
        if layer.skip_state is not None:
            blocks = unpack_bits(layer.skip_state.mask, layer.skip_state.blocks)
            visits = blocks.repeat_interleave(BLOCK_K, 3).repeat_interleave(TILE_Q, 2)[:, :, : query.shape[1]]
        out = layer(query, key, value, 0.05)
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * 0.05
        dense = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)
        skipped = scores.softmax(-1).masked_fill(visits, 0.0).sum(-1)
        want += (out - dense).square().sum().item()
        norm += dense.square().sum().item()
        dropped += skipped.mean().item() / len(inputs)
        sparsity += (layer.sparsity or 0.0) / len(inputs)
    layer.reset_skip_state()
    layer.meter = Meter()
    for query, key, value in inputs:
        layer(query, key, value, 0.05)
    cost = layer.meter.read()
    assert sparsity > 0.05
    assert cost.error == pytest.approx(math.sqrt(want / norm), rel=1e-3)
    assert cost.dropped == pytest.approx(dropped, rel=1e-3)
    assert cost.sparsity == pytest.approx(sparsity, rel=1e-3)
    assert layer.meter.read() == Cost(0.0, 0.0, 0.0)


def test_costs_ask_for_no_mean() -> None:
    """vLLM's batch-invariant mode replaces PyTorch's mean by one that raises for float64."""

    class NoMean(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func.overloadpacket is not torch.ops.aten.mean
            return func(*args, **(kwargs or {}))

    meter = Meter()
    out, lse = torch.ones(1, 2, 1, 4), torch.zeros(1, 1, 2)
    with NoMean():
        meter.add(out, lse - 1, 2 * out, lse, 0.25)
        cost = meter.read()
    assert cost == Cost(error=pytest.approx(0.5), dropped=pytest.approx(1 - math.exp(-1)), sparsity=0.25)


@pytest.mark.parametrize("rule", ["mass", "mass_summaries"])
@pytest.mark.parametrize("target", ["error=0.05", "dropped=0.01", "sparsity=0.4"])
def test_what_is_found_holds_on_other_inputs(target: str, rule: Rule, tmp_path: Path) -> None:
    wanted = Target.parse(target)
    meters = {name: Meter() for name in ("soft", "middle", "sharp")}

    def measure(thresholds: Mapping[str, float]) -> dict[str, Cost]:
        layers = {name: LiteAttention(thresholds[name], rule=rule) for name in meters}
        for name, layer in layers.items():
            layer.meter = meters[name]
        return run(layers, attention_inputs(1))

    found = find(measure, meters, wanted, model="three", inputs="noise", rule=rule, refresh_interval=0)
    found.save(tmp_path / "three.toml")
    layers = {name: LiteAttention.from_calibration(tmp_path / "three.toml", name) for name in meters}
    for name, cost in run(layers, attention_inputs(2)).items():
        assert getattr(cost, wanted.quantity) == pytest.approx(wanted.value, rel=0.25), name
    assert len(set(found.thresholds.values())) == 3


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "profile.toml"
    CALIBRATION.save(path)
    assert Calibration.load(path) == CALIBRATION
    layer = LiteAttention.from_calibration(path, "blocks.0.attn1")
    assert (layer.threshold, layer.rule, layer.refresh_interval) == (-7.25, "mass", 3)
    assert CALIBRATION.mean().error == pytest.approx(0.04)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("format = 1 -> format = 2", "format: .*got 2"),
        ('quantity = "error" -> quantity = "beauty"', "quantity: .*got 'beauty'"),
        ("target = 0.05 -> target = much", "expected TOML"),
        ("-7.25 -> 7.25", "thresholds.blocks.0.attn1: .*got 7.25"),
        ('rule = "mass" -> colour = "red"', "rule: .*required|colour"),
    ],
)
def test_a_file_that_is_none_is_refused(change: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.toml"
    CALIBRATION.save(path)
    text = path.read_text()
    old, new = change.split(" -> ")
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=f"profile.toml: .*{message}|{message}"):
        Calibration.load(path)


DECODE = DecodeCalibration(
    stage="decode",
    model="some/model",
    inputs="4 prompts",
    quantity="dropped",
    target=0.02,
    refresh_interval=0,
    shape=DecodeShape("LlamaForCausalLM", heads=9, kv_heads=3, head_dim=64),
    thresholds={"model.layers.0.self_attn.attn": -7.0, "model.layers.1.self_attn.attn": -math.inf},
    reached={"model.layers.0.self_attn.attn": cost_at(0.05), "model.layers.1.self_attn.attn": cost_at(0.0)},
)


def test_a_file_for_decoding_is_read_as_it_was_written_and_not_taken_for_denoising(tmp_path: Path) -> None:
    DECODE.save(tmp_path / "decode.toml")
    CALIBRATION.save(tmp_path / "denoise.toml")
    assert DecodeCalibration.load(tmp_path / "decode.toml") == DECODE
    assert DECODE.mean_threshold == -7.0
    with pytest.raises(ValueError, match=r"decode.toml: stage: Input should be 'forward', got 'decode'"):
        Calibration.load(tmp_path / "decode.toml")
    with pytest.raises(ValueError, match=r"denoise.toml: stage: Input should be 'decode', got 'forward'"):
        DecodeCalibration.load(tmp_path / "denoise.toml")
    other = DecodeShape("LlamaForCausalLM", heads=9, kv_heads=3, head_dim=128)
    with pytest.raises(
        ValueError, match=r"expected .* 3 KV heads of 64, as it was made for \(some/model\), got .* 128"
    ):
        DECODE.check_shape(other)


def test_other_layers_and_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layer: expected one that the calibration knows \(blocks.0.attn1, .*'x'"):
        LiteAttention.from_calibration(CALIBRATION, "x")
    with pytest.raises(ValueError, match=r"some/model.*differs in blocks.1.attn1 and 1 more"):
        CALIBRATION.check_layers(["blocks.0.attn1", "blocks.2.attn1"])
    CALIBRATION.check_layers(CALIBRATION.thresholds)
    layer = LiteAttention.from_calibration(CALIBRATION, "blocks.0.attn1")
    tensor = torch.zeros(1, 128, 8, 32)
    with pytest.raises(ValueError, match="expected 512 keys, 8 heads of 32, as the calibration.*got 128 keys"):
        layer(tensor, tensor, tensor)


@pytest.mark.parametrize("text", ["", "error", "error=", "error=0", "error=1", "error=nan", "beauty=0.5", "0.5"])
def test_a_target_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="target: expected one of error=NUMBER, dropped=NUMBER, sparsity=NUMBER"):
        Target.parse(text)


def test_layers_that_do_not_run_are_refused() -> None:
    def nothing(_thresholds: Mapping[str, float]) -> dict[str, Cost]:
        return {"idle": Cost(0.0, 0.0, 0.0)}

    with pytest.raises(ValueError, match="expected every layer to run and to skip, idle did not"):
        find(
            nothing,
            {"idle": Meter()},
            Target("error", 0.1),
            model="m",
            inputs="i",
            rule="mass",
            refresh_interval=0,
        )
