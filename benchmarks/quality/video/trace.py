"""A trace of one video, for `lite-attention plot`: what each layer skips at each step, and some skip masks.

python -m benchmarks.quality.video.trace --frames 8 --out video.trace
lite-attention plot video.trace --out docs/video_trace.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.quality.video import CHECKPOINT, scenes
from benchmarks.quality.video.evaluate import Video, choose_videos
from benchmarks.quality.video.model import VideoTransformer, load
from benchmarks.quality.video.sample import BRANCHES, Site, sample
from lite_attention import LiteAttention, Report, follow
from lite_attention.options import Rule


def trace(model: VideoTransformer, video: Video, threshold: float, rule: Rule, steps: int, guidance: float) -> Report:
    """What is skipped in a video, with the masks after a third and after two thirds of the steps."""
    attentions = {
        branch: nn.ModuleList(LiteAttention(threshold, rule=rule) for _ in range(model.config.layers))
        for branch in BRANCHES
    }

    def attention(site: Site, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attentions[BRANCHES[site.branch]][site.layer](query, key, value)

    with follow(attentions) as report, tqdm(total=steps, unit="step") as progress:
        report.keep_masks((steps // 3, 2 * steps // 3))
        sample(model, video.labels[None], video.noise[None], steps, guidance, attention, progress.update)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="of the command train")
    parser.add_argument("--threshold", type=float, default=-4.0)
    parser.add_argument("--rule", choices=get_args(Rule), default="running_max")
    parser.add_argument("--steps", type=int, default=30, help="Euler steps")
    parser.add_argument("--guidance", type=float, default=2.5)
    parser.add_argument("--frames", type=int, help="default: as the model was trained")
    parser.add_argument("--size", type=int, help="rows and columns of a frame; default: as the model was trained")
    parser.add_argument("--out", type=Path, default=Path("video.trace"))
    args = parser.parse_args()

    try:
        model = load(args.checkpoint, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    except (ValueError, FileNotFoundError) as error:
        parser.error(f"--{error}")
    frames, size = args.frames or model.config.frames, args.size or model.config.size
    (video,) = choose_videos("judge", 1, frames, size)
    report = trace(model, video, args.threshold, args.rule, args.steps, args.guidance)
    report.title = f"{scenes.describe(video.labels)}, {args.rule} {args.threshold:g}"
    report.save(args.out)
    print(f"{report}\nwrote {args.out}")


if __name__ == "__main__":
    main()
