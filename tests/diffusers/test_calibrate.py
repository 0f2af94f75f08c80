"""Calibration of a real pipeline with random weights: as a library, and as the command."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("diffusers")

from lite_attention.backend.diffusers import calibrate, enable, measure
from lite_attention.calibration import Calibration
from lite_attention.cli import app
from tests.diffusers.conftest import make_pipeline
from tests.omni.tiny import FRAMES, HEIGHT, STEPS, WIDTH, save_pipeline

Generate = Callable[..., torch.Tensor]


def test_thresholds_hold_in_other_generations(generate: Generate, tmp_path: Path) -> None:
    pipeline = make_pipeline(1)
    stock = generate(pipeline, seed=5)
    found = calibrate(pipeline, lambda: [generate(pipeline, seed) for seed in (1, 2)], "dropped=0.02", inputs="two")
    assert torch.equal(generate(pipeline, seed=5), stock)  # the pipeline has its own attention again
    checked = measure(pipeline, lambda: generate(pipeline, seed=3), found)
    assert checked.keys() == found.thresholds.keys() == found.reached.keys()
    # Tiny layers have few blocks, so costs move in steps.
    assert math.isclose(sum(cost.dropped for cost in checked.values()) / len(checked), 0.02, rel_tol=0.4)

    rising = measure(pipeline, lambda: generate(pipeline, seed=3), found, threshold_rise=3)
    assert sum(cost.sparsity for cost in rising.values()) > sum(cost.sparsity for cost in checked.values())

    found.save(tmp_path / "tiny.toml")
    report = enable(pipeline, calibration=tmp_path / "tiny.toml")
    generate(pipeline, seed=3)
    skipped = [cost.sparsity for cost in checked.values()]
    assert math.isclose(report.mean_sparsity, sum(skipped) / len(skipped), rel_tol=0.3)
    with pytest.raises(ValueError, match="expected 384 keys, 2 heads of 24, as the calibration was made for"):
        generate(pipeline, seed=3, num_frames=FRAMES + 4)


def test_a_calibration_is_not_mixed_with_other_options(pipeline: Any) -> None:
    with pytest.raises(ValueError, match=r"threshold: expected None beside calibration, which says it, got -3"):
        enable(pipeline, -3, calibration="some.toml")
    with pytest.raises(ValueError, match=r"relative: expected False beside calibration, which says it, got True"):
        enable(pipeline, relative=True, calibration="some.toml")
    with pytest.raises(ValueError, match="target: expected one of"):
        calibrate(pipeline, lambda: None, "speed=2", inputs="none")


def test_the_command_writes_a_file_that_enable_takes(tmp_path: Path, generate: Generate) -> None:
    folder = save_pipeline(tmp_path / "tiny", experts=1)
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog, running\n")
    (tmp_path / "others.txt").write_text("a bird\n")
    size = ["--steps", STEPS, "--height", HEIGHT, "--width", WIDTH, "--frames", FRAMES]
    options = ["--target", "dropped=0.02", "--device", "cpu", "--dtype", "float32", *size]
    files = ["--prompts", tmp_path / "prompts.txt", "--check", tmp_path / "others.txt", "--out", tmp_path / "tiny.toml"]
    result = CliRunner().invoke(app, ["calibrate", *map(str, [folder, *files, *options])])
    assert result.exit_code == 0, result.output
    found = Calibration.load(tmp_path / "tiny.toml")
    assert (found.model, found.quantity, found.target) == (str(folder), "dropped", 0.02)
    assert (
        found.inputs == "2 prompts of prompts.txt, seed 0, num_inference_steps 6, height 256, width 128, num_frames 9"
    )
    assert all(layer.startswith("transformer.blocks.") for layer in found.thresholds)

    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder)
    report = enable(pipeline, calibration=found)
    generate(pipeline)
    assert report.mean_sparsity > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--target", "speed=2"], "target: expected one of"),
        (["--rule", "best"], "rule: expected"),
        (["--prompts", "nowhere.txt"], "expected a text file"),
        (["--out", "nowhere/tiny.toml"], "expected a file in a folder that exists"),
        (["--dtype", "int8"], "expected one such as bfloat16"),
    ],
)
def test_the_command_says_what_is_wrong(change: list[str], message: str, tmp_path: Path) -> None:
    folder = save_pipeline(tmp_path / "tiny", experts=1)
    (tmp_path / "prompts.txt").write_text("a cat\n")
    options = [
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--out",
        str(tmp_path / "tiny.toml"),
        "--target",
        "error=0.1",
    ]
    result = CliRunner().invoke(app, ["calibrate", str(folder), *options, "--device", "cpu", *change])
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
