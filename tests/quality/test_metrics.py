"""Distances of clips on inputs whose distance is known."""

import math

import numpy as np
import pytest

from benchmarks.quality.metrics import Clip, compare


def clip(frames: int = 5, size: int = 40) -> Clip:
    """A pattern that moves by two pixels a frame, a gradient below it."""
    ramp = np.linspace(0.2, 0.6, size * size * 3, dtype=np.float32).reshape(size, size, 3)
    pattern = 0.3 * (np.random.default_rng(0).random((size, size, 1)) > 0.7)
    return np.stack([ramp + np.roll(pattern, 2 * frame, 1) for frame in range(frames)]).astype(np.float32)


def test_equal_clips() -> None:
    fidelity = compare(clip(), clip())
    assert fidelity.psnr == math.inf
    assert fidelity.ssim == pytest.approx(1.0)
    assert fidelity.temporal_error == 0.0


@pytest.mark.parametrize("deviation", [0.1, 0.01])
def test_noise_of_known_strength(deviation: float) -> None:
    dense = clip()
    noise = np.random.default_rng(1).normal(0, deviation, dense.shape).astype(np.float32)
    fidelity = compare(dense + noise, dense)
    assert fidelity.psnr == pytest.approx(-20 * math.log10(deviation), abs=0.1)
    assert 0.3 < fidelity.ssim < 0.999
    # Independent in each frame, so that a difference of two frames has sqrt(2) of it.
    motion = math.sqrt(np.mean(np.square(np.diff(dense, axis=0))))
    assert fidelity.temporal_error == pytest.approx(math.sqrt(2) * deviation / motion, rel=0.05)


def test_brightness_is_no_error_of_motion_and_standing_still_is_one() -> None:
    dense = clip()
    brighter = compare(dense + np.float32(0.05), dense)
    assert brighter.psnr == pytest.approx(-20 * math.log10(0.05), abs=0.01)
    assert brighter.temporal_error == pytest.approx(0.0, abs=1e-5)
    still = compare(np.repeat(dense[:1], len(dense), 0), dense)
    assert still.temporal_error == pytest.approx(1.0)
    assert still.ssim < 0.7


@pytest.mark.parametrize("deviation", [0.001, 0.03, 0.3])
def test_ssim_is_that_of_scikit_image(deviation: float) -> None:
    similarity = pytest.importorskip("skimage.metrics").structural_similarity
    dense = clip()
    noisy = dense + np.random.default_rng(2).normal(0, deviation, dense.shape).astype(np.float32)
    options = {"data_range": 1.0, "channel_axis": 2, "gaussian_weights": True, "use_sample_covariance": False}
    expected = [similarity(frame, exact, **options) for frame, exact in zip(noisy, dense, strict=True)]
    assert compare(noisy, dense).ssim == pytest.approx(np.mean(expected), abs=1e-6)


@pytest.mark.parametrize("shape", [(5, 40, 36, 3), (1, 40, 40, 3), (5, 10, 40, 3), (40, 40, 3)])
def test_clips_that_cannot_be_compared_are_refused(shape: tuple[int, ...]) -> None:
    dense = clip() if shape == (5, 40, 36, 3) else np.zeros(shape, np.float32)
    with pytest.raises(ValueError, match=r"clip: expected \(frames, height, width, 3\)"):
        compare(np.zeros(shape, np.float32), dense)
