"""Requests name one of the server's profiles, which `lite-attention calibrate` found on the same model in diffusers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lite_attention.calibration import Calibration
from lite_attention.costs import Shape
from tests.omni.conftest import TOKENS, Engine, cpu_only, latents
from tests.omni.tiny import FRAMES, HEAD_DIM, HEADS, HEIGHT, STEPS, WIDTH

pytestmark = cpu_only

CAREFUL = {"lite_attn": {"profile": "careful"}}


@pytest.fixture(scope="module", params=[1, 2], ids=["one-expert", "two-experts"])
def experts(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def found(models: dict[int, Path], experts: int) -> Calibration:
    from diffusers import DiffusionPipeline

    from lite_attention.backend.diffusers import calibrate

    pipeline = DiffusionPipeline.from_pretrained(models[experts])
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "num_inference_steps": STEPS}

    def generate() -> None:
        pipeline("a cat", guidance_scale=3.0, output_type="latent", generator=torch.Generator().manual_seed(0), **size)

    return calibrate(pipeline, generate, "sparsity=0.25", inputs="a cat", rule="mass_summaries")


@pytest.fixture(scope="module")
def running(
    engine: Callable[..., Any], experts: int, found: Calibration, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("profiles")
    found.save(folder / "careful.toml")
    found.model_copy(update={"shape": Shape(1000, HEADS, HEAD_DIM)}).save(folder / "larger.toml")
    profiles = {name: str(folder / f"{name}.toml") for name in ("careful", "larger")}
    options = {"rule": "mass_summaries", "profiles": profiles, "profile": "careful"}
    batches = {"max_num_seqs": 2, "request_batch_max_wait_ms": 300}
    with engine(experts, additional_config={"lite_attn": options}, **batches) as started:
        yield started


def test_each_layer_skips_by_its_own_threshold(
    running: Engine, found: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lite_attention.backend.omni import execution

    made: dict[str, set[tuple[Any, ...]]] = {}
    make = execution.Request.make

    def noted(self: Any, pool: Any, layer: str) -> Any:
        attention = make(self, pool, layer)
        made.setdefault(layer, set()).add((attention.threshold, attention.rule))
        return attention

    monkeypatch.setattr(execution.Request, "make", noted)
    (output,) = running.run(CAREFUL)
    assert made == {layer: {(threshold, "mass_summaries")} for layer, threshold in found.thresholds.items()}
    assert 0.1 < output.custom_output["lite_attn"]["sparsity"] < 0.4
    (default,) = running.run({})
    assert torch.equal(latents(default), latents(output))


def test_a_profile_that_does_not_fit_is_a_client_error_and_harms_nobody(running: Engine) -> None:
    (alone,) = running.run(CAREFUL)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"lite_attn": {"profile": "fast"}}, "lite_attn.profile: expected one of careful, larger, got 'fast'"),
        (
            {"lite_attn": {"profile": "larger"}},
            f"one for the {TOKENS:,} keys .*, got .larger., made for 1,000",
        ),
        ({**CAREFUL, "num_frames": FRAMES + 4}, f"lite_attn.profile: expected one for the .* made for {TOKENS:,}"),
    ]
    for job, message in bad:
        (refused,) = running.run(job)
        beside, refused_again = running.run(CAREFUL, job)
        for error in (refused, refused_again):
            assert getattr(error, "status_code", None) == 400, error
            with pytest.raises(type(error), match=message):
                raise error
        torch.testing.assert_close(latents(beside), latents(alone), rtol=0, atol=1e-4)
        assert beside.custom_output["lite_attn"] == alone.custom_output["lite_attn"]
