"""Calibration of the video model: thresholds by layer for several targets, and what they cost in held-out videos.

For each target thresholds are found on videos of the split `calibrate` (`lite_attention.calibration`), then measured
on videos of the split `judge`, whose labels are held out. Both branches of guidance count.

    python -m benchmarks.quality.video.calibrate
    python -m benchmarks.quality.video.calibrate --targets error=0.05 --videos 1 --steps 15
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast, get_args

import torch
from torch import Tensor

from benchmarks.quality.calibration import RELATIVE, Row, compare, print_rows
from benchmarks.quality.video import CHECKPOINT
from benchmarks.quality.video.evaluate import Video, choose_videos
from benchmarks.quality.video.model import HEAD_DIM, PATCH, VideoTransformer, load
from benchmarks.quality.video.sample import Site, sample
from benchmarks.results import DIRECTORY, write_result
from lite_attention import LiteAttention
from lite_attention.calibration import Target, find
from lite_attention.costs import Cost, Meter
from lite_attention.options import Rule

TARGETS = ("error=0.02", "error=0.05", "error=0.1")


class Measurement:
    """Runs the model with thresholds by layer, and says what they cost."""

    def __init__(self, model: VideoTransformer, rule: Rule, steps: int, guidance: float) -> None:
        self.model, self.rule, self.steps, self.guidance = model, rule, steps, guidance
        self.meters = {f"blocks.{number}": Meter() for number in range(model.config.layers)}

    def __call__(self, videos: Sequence[Video], thresholds: Mapping[str, float]) -> dict[str, Cost]:
        for video in videos:
            self._generate(video, thresholds)
        return {name: meter.read() for name, meter in self.meters.items()}

    def _generate(self, video: Video, thresholds: Mapping[str, float]) -> None:
        layers: dict[tuple[int, int], LiteAttention] = {}

        def attention(site: Site, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            layer = layers.get(site[1:])
            if layer is None:
                name = f"blocks.{site.layer}"
                layer = layers[site[1:]] = LiteAttention(thresholds[name], rule=self.rule)
                layer.meter = self.meters[name]
            return cast(Tensor, layer(query, key, value))

        sample(self.model, video.labels[None], video.noise[None], self.steps, self.guidance, attention)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="of the command train")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), help="as those of lite-attention calibrate")
    parser.add_argument("--rule", choices=get_args(Rule), default="mass")
    parser.add_argument("--videos", type=int, default=2, help="to calibrate on, and as many others to judge")
    parser.add_argument("--steps", type=int, default=30, help="Euler steps of a video")
    parser.add_argument("--guidance", type=float, default=2.5)
    parser.add_argument("--frames", type=int, help="of a video; default: as the model was trained")
    parser.add_argument("--size", type=int, help="rows and columns of a frame; default: as the model was trained")
    parser.add_argument("--name", default="video_calibration", help="of the result")
    parser.add_argument("--out", type=Path, default=DIRECTORY, help="folder of NAME.json")
    args = parser.parse_args()
    try:
        targets = [Target.parse(target) for target in args.targets]
        model = load(args.checkpoint, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    except (ValueError, FileNotFoundError) as error:
        parser.error(f"--{error}")
    frames, size = args.frames or model.config.frames, args.size or model.config.size
    videos, others = (choose_videos(split, args.videos, frames, size) for split in ("calibrate", "judge"))
    measure = Measurement(model, args.rule, args.steps, args.guidance)
    setup = {
        "videos": args.videos, "held_out_videos": args.videos, "rule": args.rule, "steps": args.steps,
        "guidance": args.guidance, "tokens": frames * (size // PATCH) ** 2, "layers": model.config.layers,
        "heads": model.config.heads, "head_dim": HEAD_DIM, "within": RELATIVE,
    }  # fmt: skip
    rows: list[Row] = []
    for target in targets:
        found = find(
            lambda thresholds: measure(videos, thresholds), measure.meters, target,
            model="the video model", inputs=f"{args.videos} videos", rule=args.rule, refresh_interval=0,
        )  # fmt: skip
        rows.append(compare(target, found.thresholds, found.reached, measure(others, found.thresholds)))
        write_result(args.name, setup, rows, args.out)
    print_rows(rows)


if __name__ == "__main__":
    main()
