"""How far a clip made with skipping is from the dense one of the same seed."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import conv2d

WINDOW = 11
"""Pixels of the Gaussian window of SSIM; its deviation is 1.5."""

Clip = NDArray[np.float32]
"""(frames, height, width, 3), 0 to 1."""


class Fidelity(NamedTuple):
    """Distance of two clips."""

    psnr: float
    """Peak signal-to-noise ratio over all frames, dB; inf for equal clips."""
    ssim: float
    """Structural similarity with Gaussian windows of 11 pixels, mean over the frames; 1 for equal clips."""
    temporal_error: float
    """RMS of the error of the differences between consecutive frames, over the RMS of the dense clip's differences: 0
    for the same motion, 1 for what is as far from it as a still picture."""


def compare(clip: Clip, dense: Clip) -> Fidelity:
    """Distance of a clip to the dense one.

    Raises:
        ValueError: shapes differ or a clip is too small.
    """
    if clip.shape != dense.shape or clip.ndim != 4 or min(clip.shape[1:3]) < WINDOW or len(clip) < 2:
        raise ValueError(
            f"clip: expected (frames, height, width, 3) of the dense clip, 2 frames of 11 x 11 pixels or more, "
            f"got {clip.shape} and {dense.shape}"
        )
    error = _rms(clip - dense)
    motion = np.diff(dense, axis=0)
    motion_error = _rms(np.diff(clip, axis=0) - motion)
    return Fidelity(
        psnr=-20 * math.log10(error) if error else math.inf,
        ssim=float(np.mean([_ssim(*frames) for frames in zip(clip, dense, strict=True)])),
        temporal_error=motion_error / max(_rms(motion), float(np.finfo(np.float32).tiny)),
    )


def _rms(values: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def _ssim(frame: NDArray[np.float32], dense: NDArray[np.float32]) -> float:
    x, y = (torch.from_numpy(picture).double().permute(2, 0, 1)[:, None] for picture in (frame, dense))
    mean_x, mean_y = _blurred(x), _blurred(y)
    variances = _blurred(x * x) - mean_x**2 + _blurred(y * y) - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    like = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
    return float((like * (2 * covariance + 0.03**2) / (variances + 0.03**2)).mean())


def _blurred(pictures: Tensor) -> Tensor:
    """(channels, 1, height, width), where the window lies inside."""
    weights = torch.exp(-(((torch.arange(WINDOW) - WINDOW // 2) / 1.5).double() ** 2) / 2)
    weights /= weights.sum()
    return conv2d(conv2d(pictures, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
