"""Clips from the model: Euler steps from noise to a scene, with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.quality.methods import dense_attention
from benchmarks.quality.video.model import NO_LABELS, LayerAttention, VideoTransformer, precision

BRANCHES = ("conditional", "unconditional")


class Site(NamedTuple):
    """Which attention of a generation."""

    step: int
    branch: int
    """Of `BRANCHES`."""
    layer: int


SiteAttention = Callable[[Site, Tensor, Tensor, Tensor], Tensor]
"""Attention of a site, of query, key and value, (batch, tokens, heads, head_dim) each."""


def dense(site: Site, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """PyTorch's attention everywhere."""
    return dense_attention(query, key, value)


def noise(frames: int, size: int, seed: int) -> Tensor:
    """Noise of a seed, (3, frames, size, size), the same on every device."""
    return torch.randn(3, frames, size, size, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def sample(
    model: VideoTransformer,
    labels: Tensor,
    start: Tensor,
    steps: int,
    guidance: float,
    attention: SiteAttention = dense,
    after_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """Clips, float32 on the CPU, shape of ``start``, 0 to 1.

    Args:
        model: on the device where all is computed.
        labels: int64 (batch, 4).
        start: noise, (batch, 3, frames, height, width).
        steps: number of Euler steps, of the same length.
        guidance: factor of what the labels change; 1 for the labels as they are.
        attention: computes the attention of every site; the two branches of guidance are computed one after the other.
        after_step: called after each step, as for a progress bar.
    """
    device = model.patch_in.weight.device
    clips, labels = start.to(device), labels.to(device)
    branches = (labels, torch.tensor(NO_LABELS, device=device).expand_as(labels))
    times = torch.linspace(1, 0, steps + 1).tolist()
    with precision(device):
        for step in range(steps):
            time = torch.full((len(clips),), times[step], device=device)
            velocities = [
                model(clips, time, of_branch, _at(attention, step, branch)) for branch, of_branch in enumerate(branches)
            ]
            velocity = velocities[1] + guidance * (velocities[0] - velocities[1])
            clips = clips + (times[step + 1] - times[step]) * velocity
            after_step()
    return ((clips + 1) / 2).clamp(0, 1).cpu()


def _at(attention: SiteAttention, step: int, branch: int) -> LayerAttention:
    return lambda layer, query, key, value: attention(Site(step, branch, layer), query, key, value)
