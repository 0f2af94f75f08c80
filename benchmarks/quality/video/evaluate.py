"""What skipping costs in videos: every method at several thresholds, against dense attention with the same seed.

For each video the model samples once with PyTorch's dense attention, then once with each method from the same noise.
Kept are, as means over the videos: PSNR, SSIM and the error of motion against the dense clip
(`benchmarks.quality.metrics`), the share of blocks skipped, the share of the softmax mass in them, and, where the
project's kernels run, the time of all attention (CUDA events). `product-*` is the product as it is; the other methods
are emulated (`benchmarks.quality.methods`) and have no time. A method that skips nothing shows how much rounding alone
moves a clip.

Videos for judging have labels that training never saw together; for choosing thresholds there are others
(`--split calibrate`). Methods are measured one after the other, each on all videos, and results are written after
each: what is broken off, or has no time left (`--minutes`), lacks the last methods.

    python -m benchmarks.quality.video.evaluate
    python -m benchmarks.quality.video.evaluate --methods 'product-*' budget:-5,-4,-3 --videos 8
    python -m benchmarks.quality.video.evaluate --frames 8 --name video_quality_short    # half the tokens
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from benchmarks.quality.methods import METHODS, Attention, DenseAttention, Method, choose_methods
from benchmarks.quality.metrics import Fidelity, compare
from benchmarks.quality.video import CHECKPOINT, FOLDER, scenes
from benchmarks.quality.video.model import HEAD_DIM, PATCH, VideoTransformer, load
from benchmarks.quality.video.sample import BRANCHES, Site, noise, sample
from benchmarks.results import DIRECTORY, write_result

DENSE = Method("dense", -math.inf, DenseAttention)
SPLITS = {"calibrate": 0, "judge": 1_000_000}
"""First seed of each; `judge` has labels that are held out."""
Measure = Literal["psnr", "ssim", "temporal_error"]
STILLS = 4
"""Frames of the first video that are kept for the picture."""


class Video(NamedTuple):
    """What is sampled."""

    labels: Tensor
    """int64 (4,)."""
    noise: Tensor
    """(3, frames, size, size)."""


class Run(NamedTuple):
    """One video by one method."""

    clip: Tensor
    """(frames, height, width, 3), 0 to 1."""
    sparsity: Tensor
    """(steps, branches, layers)."""
    dropped: Tensor
    """(steps, branches, layers)."""
    milliseconds: float | None
    """Of all attention."""


def choose_videos(split: str, count: int, frames: int, size: int) -> list[Video]:
    """The first ``count`` videos of a split, the same on every machine."""
    first = SPLITS[split]
    labels = scenes.draw_labels(count, torch.Generator().manual_seed(first), held_out=split == "judge")
    return [Video(label, noise(frames, size, first + i)) for i, label in enumerate(labels)]


def generate(model: VideoTransformer, video: Video, method: Method, steps: int, guidance: float) -> Run:
    """One video with a state for each layer and branch of guidance."""
    layers: dict[tuple[int, int], Attention] = {}
    shape = (steps, len(BRANCHES), model.config.layers)
    sparsity, dropped = torch.zeros(2, *shape, device=model.patch_in.weight.device)

    def attention(site: Site, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        layer = layers.get(site[1:])
        if layer is None:
            layer = layers[site[1:]] = method.make()
        out = layer(query, key, value, phase=method.phase(site.step, steps))
        sparsity[site], dropped[site] = layer.sparsity, layer.dropped
        return out

    clip = sample(model, video.labels[None], video.noise[None], steps, guidance, attention)[0]
    times = [layer.milliseconds() for layer in layers.values()]
    return Run(
        clip.permute(1, 2, 3, 0),
        sparsity.cpu(),
        dropped.cpu(),
        None if None in times else sum(milliseconds for milliseconds in times if milliseconds is not None),
    )


class Comparison:
    """A method over all videos so far."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self.runs: list[Run] = []
        self.fidelities: list[Fidelity] = []

    def add(self, run: Run, dense: Run) -> None:
        """Add a video; of its frames only the first video's stills are kept."""
        self.fidelities.append(compare(run.clip.numpy(), dense.clip.numpy()))
        self.runs.append(run._replace(clip=torch.empty(0) if self.runs else stills(run.clip)))

    def row(self) -> dict[str, Any]:
        """Means over the videos; a PSNR of None is that of equal clips."""
        psnrs = [fidelity.psnr for fidelity in self.fidelities]
        times = [run.milliseconds for run in self.runs if run.milliseconds is not None]
        return {
            "method": self.method.name,
            "threshold": _finite(self.method.threshold),
            "warmup_steps": self.method.warmup_steps,
            "cooldown_steps": self.method.cooldown_steps,
            "psnr": _finite(statistics.mean(psnrs)),
            "ssim": statistics.mean(fidelity.ssim for fidelity in self.fidelities),
            "temporal_error": statistics.mean(fidelity.temporal_error for fidelity in self.fidelities),
            "sparsity": statistics.mean(run.sparsity.mean().item() for run in self.runs),
            "dropped": statistics.mean(run.dropped.mean().item() for run in self.runs),
            "attention_milliseconds": statistics.mean(times) if times else None,
            "psnr_of_videos": [_finite(psnr) for psnr in psnrs],
            "sparsity_of_videos": [run.sparsity.mean().item() for run in self.runs],
            "finite": not any(math.isnan(psnr) for psnr in psnrs),
        }


def _finite(number: float) -> float | None:
    """JSON has no infinity."""
    return number if math.isfinite(number) else None


def stills(clip: Tensor) -> Tensor:
    """Some frames of a clip, uint8."""
    frames = torch.linspace(0, len(clip) - 1, min(STILLS, len(clip))).long()
    return (clip[frames] * 255).round().byte().contiguous()


def evaluate(
    model: VideoTransformer,
    videos: Sequence[Video],
    methods: Sequence[Method],
    steps: int,
    guidance: float,
    minutes: float = math.inf,
    keep: Callable[[Sequence[Comparison]], object] = lambda comparisons: None,
) -> list[Comparison]:
    """Dense attention and then each method over all videos; no method is begun after so many minutes.

    `keep` is called after each of them with what is known so far.
    """
    if model.patch_in.weight.is_cuda:
        # Kernels are loaded, and chosen, before anything is timed; those of skipping by the second step that may skip.
        for method in tqdm({method.name: method for method in (DENSE, *methods)}.values(), desc="warm-up"):
            generate(model, videos[0], method, method.warmup_steps + 2 + method.cooldown_steps, guidance)
    start = time.monotonic()
    comparisons: list[Comparison] = []
    dense: list[Run] = []
    with tqdm(total=len(videos) * (1 + len(methods)), unit="clip") as progress:
        for method in (DENSE, *methods):
            if comparisons and time.monotonic() - start > 60 * minutes:
                break
            comparison = Comparison(method)
            for number, video in enumerate(videos):
                progress.set_postfix_str(str(method))
                run = generate(model, video, method, steps, guidance)
                if len(dense) == number:
                    dense.append(run)
                comparison.add(run, dense[number])
                progress.update()
            comparisons.append(comparison)
            keep(comparisons)
    return comparisons


def keep_pictures(comparisons: Sequence[Comparison], path: Path) -> None:
    """Keep stills of the first video, and where each method skipped in it, for `benchmarks.quality.video.plot`."""
    tensors = {}
    for comparison in comparisons:
        first = comparison.runs[0]
        tensors[f"stills {comparison.method}"] = first.clip
        tensors[f"sparsity {comparison.method}"] = first.sparsity
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


def at_quality(
    rows: Sequence[dict[str, Any]], quality: float, measure: Measure = "psnr"
) -> dict[str, tuple[float, float | None]]:
    """Sparsity of methods, and milliseconds of attention, where their PSNR falls to so much, or another measure.

    Between two thresholds on a straight line; methods that do not fall to it, or begin below, are left out.
    """
    sign = -1 if measure == "temporal_error" else 1  # an error rises
    found: dict[str, tuple[float, float | None]] = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        known = [row for row in rows if row["method"] == method and row["psnr"] is not None]
        falling = sorted(known, key=lambda row: row["sparsity"])
        for above, below in pairwise(falling):
            if sign * above[measure] >= sign * quality > sign * below[measure]:
                part = (above[measure] - quality) / (above[measure] - below[measure])
                times = above["attention_milliseconds"], below["attention_milliseconds"]
                sparsity = (1 - part) * above["sparsity"] + part * below["sparsity"]
                found[method] = sparsity, None if None in times else (1 - part) * times[0] + part * times[1]
                break
    return found


def of_one_run(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the times that they would have in the run of the row `dense`: cards differ by a per cent or two.

    A row that was added from another run says in `dense_milliseconds` what PyTorch's dense attention took there.
    """
    dense = next((row["attention_milliseconds"] for row in rows if row["method"] == "dense"), None)
    return [
        row | {"attention_milliseconds": row["attention_milliseconds"] * dense / row["dense_milliseconds"]}
        if "dense_milliseconds" in row
        else row
        for row in rows
    ]


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """The figures as a table in Markdown."""
    print("| method | threshold | PSNR dB | SSIM | temporal error | sparsity | dropped | attention ms |")
    print("|---" * 8 + "|")
    for row in rows:
        threshold = "" if row["threshold"] is None else f"{row['threshold']:g}"
        psnr = f"{row['psnr']:.1f}" if row["psnr"] is not None else "equal" if row["finite"] else "not finite"
        milliseconds = "" if row["attention_milliseconds"] is None else f"{row['attention_milliseconds']:.0f}"
        print(
            f"| {row['method']} | {threshold} | {psnr} | {row['ssim']:.4f} | {row['temporal_error']:.3f} "
            f"| {row['sparsity']:.3f} | {row['dropped']:.5f} | {milliseconds} |"
        )
    for decibels in (33.0, 40.0):
        for method, (sparsity, time_of_attention) in at_quality(rows, decibels).items():
            milliseconds = "" if time_of_attention is None else f", attention {time_of_attention:.0f} ms"
            print(f"{method} at {decibels:.0f} dB: sparsity {sparsity:.3f}{milliseconds}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="of the command train")
    parser.add_argument("--methods", nargs="+", default=["*"], metavar="NAME[:THRESHOLDS]",
                        help=f"names or patterns, thresholds with commas; names are {', '.join(METHODS)}")  # fmt: skip
    parser.add_argument("--videos", type=int, default=3, help="number of them")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin no method after so many")
    parser.add_argument("--split", choices=SPLITS, default="judge")
    parser.add_argument("--steps", type=int, default=30, help="Euler steps of a video")
    parser.add_argument("--guidance", type=float, default=2.5)
    parser.add_argument("--frames", type=int, help="of a video; default: as the model was trained")
    parser.add_argument("--size", type=int, help="rows and columns of a frame; default: as the model was trained")
    parser.add_argument("--name", default="video_quality", help="of the result")
    parser.add_argument("--out", type=Path, default=DIRECTORY, help="folder of NAME.json")
    parser.add_argument(
        "--pictures", type=Path, default=FOLDER, help="folder of NAME.safetensors, for the command plot"
    )
    args = parser.parse_args()
    for option in ("videos", "steps", "minutes"):
        if not getattr(args, option) > 0:
            parser.error(f"--{option}: expected a number above 0, got {getattr(args, option)}")
    try:
        methods = choose_methods(args.methods)
        model = load(args.checkpoint, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    except (ValueError, FileNotFoundError) as error:
        parser.error(f"--{error}")
    frames, size = args.frames or model.config.frames, args.size or model.config.size
    if frames < 2 or size < 11 or size % PATCH:
        parser.error(f"--frames, --size: expected 2 or more, and a multiple of {PATCH} from 12, got {frames}, {size}")

    torch.set_float32_matmul_precision("high")  # for the emulator: inputs are exact in it
    videos = choose_videos(args.split, args.videos, frames, size)
    setup = {
        "first_video": scenes.describe(videos[0].labels),
        "split": args.split,
        "frames": frames,
        "size": size,
        "tokens": frames * (size // PATCH) ** 2,
        "layers": model.config.layers,
        "heads": model.config.heads,
        "head_dim": HEAD_DIM,
        "steps": args.steps,
        "guidance": args.guidance,
    }

    def keep(comparisons: Sequence[Comparison]) -> None:
        keep_pictures(comparisons, args.pictures / f"{args.name}.safetensors")
        rows = [comparison.row() for comparison in comparisons]
        write_result(args.name, setup | {"videos": len(comparisons[0].runs)}, rows, args.out)

    comparisons = evaluate(model, videos, methods, args.steps, args.guidance, args.minutes, keep)
    print_table([comparison.row() for comparison in comparisons])


if __name__ == "__main__":
    main()
