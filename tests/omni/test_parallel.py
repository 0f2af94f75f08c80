"""LITE_ATTN in vLLM-Omni's engine on two GPUs. Each engine is two processes: best run side by side."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.omni.conftest import latents
from tests.omni.test_offline import OFF, ROUNDING, STRONG

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

ROOT = Path(__file__).parents[2]
WAYS: list[dict[str, int]] = [{"ulysses_degree": 2}, {"allgather_degree": 2}, {"cfg_parallel_size": 2}]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_two_gpus_compute_what_one_does(
    engine: Callable[..., Any], way: dict[str, int], record_property: Callable[[str, object], None]
) -> None:
    found = []
    for settings in ({}, way):
        with engine(**settings) as running:
            outputs = [running.run({"lite_attn": options})[0] for options in (OFF, STRONG, STRONG)]
        found.append(([latents(output) for output in outputs], outputs[1].custom_output["lite_attn"]))
    (alone, said_alone), (together, said) = found
    record_property("skipped", [said_alone["sparsity"], said["sparsity"]])
    differences = [float((one - two).abs().max()) for one, two in zip(alone, together, strict=True)]
    record_property("differences", differences)
    torch.testing.assert_close(together[0], alone[0], rtol=0, atol=ROUNDING)
    assert torch.equal(together[1], together[2])
    assert said["sparsity"] > 0.05
    # The first GPU counts: half of the heads, of the queries or of the branches.
    assert abs(said["blocks_total"] / said_alone["blocks_total"] - 0.5) < 0.01


def test_ring_parallelism_is_refused_with_the_reason(models: dict[int, Path]) -> None:
    command = [sys.executable, "-m", "tests.omni.serve", "serve", str(models[1]), "--omni", "--ring-degree", "2"]
    command += ["--enforce-eager", "--diffusion-attention-config.default.backend", "LITE_ATTN"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, timeout=180)
    assert done.returncode != 0
    assert "LITE_ATTN does not support ring parallelism (ring_degree=2)" in done.stdout
