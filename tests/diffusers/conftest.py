"""Tiny pipelines and transformers of diffusers with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

HEIGHT, WIDTH, FRAMES, STEPS = 256, 128, 9, 6
"""A video of 384 tokens: 3 tiles of queries, 6 blocks of keys."""
TEXT = 7


def sharpen(transformer: Any) -> Any:
    """Let attention of random weights depend on distance, so that whole blocks matter little to a tile."""
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if name.endswith(("to_q.weight", "to_k.weight")):
                parameter.mul_(0.1)
            if name.endswith(("to_q.bias", "to_k.bias")):
                parameter.normal_()
            if "norm_q" in name or "norm_k" in name:
                parameter.mul_(3.0)
    return transformer.eval()


def make_transformer(seed: int) -> Any:
    torch.manual_seed(seed)
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return sharpen(transformer)


def make_pipeline(experts: int) -> Any:
    """A Wan pipeline without text encoder and decoder; of two experts the second takes the last steps."""
    transformers = {"transformer": make_transformer(0)}
    if experts == 2:
        transformers |= {"transformer_2": make_transformer(1), "boundary_ratio": 0.9}
    pipeline = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        **transformers,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(params=[1, 2], ids=["one expert", "two experts"])
def pipeline(request: pytest.FixtureRequest) -> Any:
    return make_pipeline(request.param)


@pytest.fixture
def generate() -> Callable[..., torch.Tensor]:
    """Latents of a video: the seed chooses prompt and noise."""

    def call(pipeline: Any, seed: int = 0, **options: Any) -> torch.Tensor:
        noise = torch.Generator().manual_seed(seed)
        prompt, negative = torch.randn(2, 1, TEXT, 32, generator=noise).unbind(0)
        defaults = {"guidance_scale": 3.0, "num_inference_steps": STEPS}
        defaults |= {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES}
        return pipeline(  # type: ignore[no-any-return]
            prompt_embeds=prompt,
            negative_prompt_embeds=negative,
            generator=noise,
            output_type="latent",
            **(defaults | options),
        ).frames

    return call
