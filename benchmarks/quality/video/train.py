"""Train the video model on drawn scenes, within a budget of minutes, and keep its averaged weights.

Most steps are on small clips of few tokens, the last ones on whole clips (16 frames of 112 x 112 pixels, 12,544
tokens). Scenes are drawn on the device while it trains. One combination of labels in 8 is kept for judging.

    python -m benchmarks.quality.video.train                       # 8 minutes, made for one H100 with 80 GB
    python -m benchmarks.quality.video.train --tiny --minutes 5    # a tiny model that learns on a CPU
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.quality.video import FOLDER, scenes
from benchmarks.quality.video.model import NO_LABELS, TINY, Config, VideoTransformer, precision, save
from benchmarks.quality.video.sample import noise, sample

LEARNING_RATE = 1e-3
WARMUP_STEPS = 200
DECAY_FROM = 0.6
"""Share of the budget after which the learning rate falls."""
EMA_DECAY = 0.995
UNLABELLED = 0.1
"""Share of clips that are seen without labels, for guidance."""


class Stage(NamedTuple):
    """Part of the training at one size of clips."""

    share: float
    """Of the budget."""
    frames: int
    size: int
    batch: int


# The same number of tokens, about 50,000, in every step.
STAGES = (Stage(0.5, 8, 56, 32), Stage(0.15, 8, 112, 8), Stage(0.35, 16, 112, 4))
TINY_STAGES = (Stage(0.7, 4, 16, 16), Stage(0.3, 4, 32, 4))


def train(
    config: Config,
    stages: Sequence[Stage],
    device: torch.device,
    *,
    minutes: float = math.inf,
    steps: float = math.inf,
    seed: int = 0,
) -> tuple[VideoTransformer, list[float]]:
    """The model with averaged weights, and the loss of each step, once one of the budgets is spent."""
    torch.manual_seed(seed)
    random = torch.Generator(device).manual_seed(seed)
    model = VideoTransformer(config).to(device)
    averaged = VideoTransformer(config).to(device).requires_grad_(False)
    averaged.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, (0.9, 0.95), weight_decay=0.01)
    losses: list[float] = []
    start = time.monotonic()
    progress = 0.0
    with tqdm(total=100, unit="%", bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}") as bar:
        while progress < 1:
            stage = _stage(stages, progress)
            warm = min((len(losses) + 1) / WARMUP_STEPS, 1)
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * warm * min((1 - progress) / (1 - DECAY_FROM), 1)
            loss = _loss(model, stage, random)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            _average(averaged, model, min(EMA_DECAY, (len(losses) + 1) / (len(losses) + 10)))
            losses.append(loss.item())
            progress = max((time.monotonic() - start) / (60 * minutes), len(losses) / steps)
            bar.update(min(100 * progress, 100) - bar.n)
            clip = f"{stage.frames} x {stage.size} x {stage.size}"
            bar.set_postfix(step=len(losses), clip=clip, loss=f"{_recent(losses):.4f}")
    return averaged.eval(), losses


def _stage(stages: Sequence[Stage], progress: float) -> Stage:
    """The stage at a share of the whole budget."""
    end = 0.0
    for stage in stages:
        end += stage.share
        if progress < end:
            return stage
    return stages[-1]


def _loss(model: VideoTransformer, stage: Stage, random: torch.Generator) -> Tensor:
    """Mean squared error of the velocity at random times of fresh scenes."""
    device = random.device
    labels = scenes.draw_labels(stage.batch, random)
    clips = scenes.render(labels, random, stage.frames, stage.size, stage.size)
    noises = torch.randn(clips.shape, generator=random, device=device)
    times = torch.randn(stage.batch, generator=random, device=device).sigmoid()
    unlabelled = torch.rand(stage.batch, 1, generator=random, device=device) < UNLABELLED
    labels = torch.where(unlabelled, torch.tensor(NO_LABELS, device=device), labels)
    mixed = torch.lerp(clips, noises, times.view(-1, 1, 1, 1, 1))
    with precision(device):
        velocity = model(mixed, times, labels)
    return (velocity - (noises - clips)).square().mean()


@torch.no_grad()
def _average(averaged: VideoTransformer, model: VideoTransformer, decay: float) -> None:
    torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)


def _recent(losses: list[float]) -> float:
    """Mean of the last 100."""
    return sum(losses[-100:]) / len(losses[-100:])


def picture(model: VideoTransformer, path: Path, steps: int = 30, guidance: float = 2.5, scenes_shown: int = 6) -> None:
    """Draw frames of samples with labels that the model has never seen together."""
    labels = scenes.draw_labels(scenes_shown, torch.Generator().manual_seed(0), held_out=True)
    frames = torch.linspace(0, model.config.frames - 1, min(8, model.config.frames)).int().tolist()
    figure, rows = plt.subplots(
        scenes_shown, len(frames), figsize=(1.3 * len(frames), 1.5 * scenes_shown), squeeze=False
    )
    for seed, (label, row) in enumerate(zip(tqdm(labels, unit="sample"), rows, strict=True)):
        start = noise(model.config.frames, model.config.size, seed)
        clip = sample(model, label[None], start[None], steps, guidance)[0]
        row[0].set_title(scenes.describe(label), fontsize=8, loc="left")
        for panel, frame in zip(row, frames, strict=True):
            panel.imshow(clip[:, frame].permute(1, 2, 0).numpy())
            panel.axis("off")
    figure.savefig(path, dpi=100, bbox_inches="tight")
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of model.safetensors and samples.png")
    parser.add_argument("--minutes", type=float, default=8.0, help="stop after so many minutes of training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="0.8 M parameters, clips of 4 x 32 x 32 pixels")
    args = parser.parse_args()
    if not args.minutes > 0:
        parser.error(f"--minutes: expected a number above 0, got {args.minutes}")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    config, stages = (TINY, TINY_STAGES) if args.tiny else (Config(), STAGES)
    model, losses = train(config, stages, device, minutes=args.minutes, seed=args.seed)
    path = args.out / "model.safetensors"
    save(model, path)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(losses)} steps, loss {_recent(losses):.4f}, {parameters / 1e6:.1f} M parameters: wrote {path}")
    picture(model, args.out / "samples.png")


if __name__ == "__main__":
    main()
