"""Which bend of the summaries' spread (`lite_attention.reference.spread`) leaves the smallest error in one step.

Attention of the video model is caught at some steps of a dense generation. For a sample of its rows every block whose
exact share is at most ``2**threshold``, but the largest, is then replaced by its summary, and the relative L2 error of
the output says how well it stands in: without anything in its place (``dropped``), as keys at their mean (bend 0), with
several bends, and with the spread of infinitely many Gaussian keys (bend infinite, v / 2).

    python -m benchmarks.quality.video.bend    # 5 minutes on two cores
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

from benchmarks.quality.methods import dense_attention, log2_sum_exp2
from benchmarks.quality.video import CHECKPOINT
from benchmarks.quality.video.evaluate import choose_videos
from benchmarks.quality.video.model import HEAD_DIM, PATCH, load
from benchmarks.quality.video.sample import Site, sample
from benchmarks.results import DIRECTORY, write_result
from lite_attention.reference import LOG2_E, spread, summarize_blocks
from lite_attention.tiles import BLOCK_K

BENDS = (0.0, 2.0, 4.0, 8.0, 16.0, 32.0, math.inf)
EVERY_ROW, EVERY_HEAD = 97, 2
"""Of which one is looked at."""


def squared_errors(
    query: Tensor, key: Tensor, value: Tensor, threshold: float, bends: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Squared errors of the output, dropped and with each bend, (1 + bends,), and its square (), of one head.

    Args:
        query: (rows, head_dim), times softmax scale * log2(e), float32.
        key, value: (tokens, head_dim), float32.
        threshold: log2 of the share up to which a row's block is replaced.
        bends: 0 for keys at their mean.
    """
    summaries = summarize_blocks(key[None, :, None], value[None, :, None])
    mean, variance, mean_value = (part[0, :, 0] for part in summaries)
    filled = -len(key) % BLOCK_K
    scores = pad(query @ key.T, (0, filled), value=-math.inf).unflatten(1, (-1, BLOCK_K))
    values = pad(value, (0, 0, 0, filled))
    counts = scores.isfinite()[0].sum(1)
    mass = log2_sum_exp2(scores)
    lse = log2_sum_exp2(mass)[:, None]
    dense = torch.exp2(scores - lse[..., None]).flatten(1) @ values
    kept = (mass - lse > threshold) | (mass == mass.amax(1, keepdim=True))
    at_mean = counts.log2() + query @ mean.T
    spreads = query.square() @ variance.T / LOG2_E**2
    estimates = [torch.full_like(mass, -math.inf), *(at_mean + _spread(spreads, bend) for bend in bends)]
    errors = []
    for estimate in estimates:
        taken = torch.where(kept, mass, estimate)
        total = log2_sum_exp2(taken)[:, None]
        out = (torch.exp2(scores - total[..., None]) * kept[..., None]).flatten(1) @ values
        out += (torch.exp2(taken - total) * ~kept) @ mean_value
        errors.append((out - dense).square().sum())
    return torch.stack(errors), dense.square().sum()


def _spread(variance: Tensor, bend: float) -> Tensor:
    if bend == math.inf:
        return variance / 2 * LOG2_E
    return spread(variance, bend) if bend else torch.zeros_like(variance)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="of the command train")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[-9.0, -7.0])
    parser.add_argument("--steps", type=int, default=8, help="Euler steps of the video; three of them count")
    parser.add_argument("--guidance", type=float, default=2.5)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", type=int, help="rows and columns of a frame; default: as the model was trained")
    parser.add_argument("--out", type=Path, default=DIRECTORY, help="folder of video_bend.json")
    args = parser.parse_args()
    model = load(args.checkpoint, torch.device("cpu"))
    size = args.size or model.config.size
    (video,) = choose_videos("calibrate", 1, args.frames, size)
    counting = (args.steps // 8, args.steps // 2, args.steps * 3 // 4)
    errors = torch.zeros(len(args.thresholds), 1 + len(BENDS), dtype=torch.float64)
    squares = torch.zeros(len(args.thresholds), 1, dtype=torch.float64)

    def attention(site: Site, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if site.branch == 0 and site.step in counting:
            for head in range(0, query.shape[2], EVERY_HEAD):
                rows = query[0, 5::EVERY_ROW, head] * (HEAD_DIM**-0.5 * LOG2_E)
                for number, threshold in enumerate(args.thresholds):
                    of_head = squared_errors(rows, key[0, :, head], value[0, :, head], threshold, BENDS)
                    errors[number] += of_head[0]
                    squares[number] += of_head[1]
        return dense_attention(query, key, value)

    with tqdm(total=args.steps, unit="step") as progress:
        sample(model, video.labels[None], video.noise[None], args.steps, args.guidance, attention, progress.update)
    bends = [str(int(bend)) if bend < math.inf else "infinite" for bend in BENDS]
    rows = [
        {"threshold": threshold, "dropped": relative[0], "bends": dict(zip(bends, relative[1:], strict=True))}
        for threshold, relative in zip(args.thresholds, (errors / squares).sqrt().tolist(), strict=True)
    ]
    setup = {
        "frames": args.frames, "tokens": args.frames * (size // PATCH) ** 2, "steps": args.steps, "counting": counting,
        "layers": model.config.layers, "every_row": EVERY_ROW, "every_head": EVERY_HEAD,
    }  # fmt: skip
    write_result("video_bend", setup, rows, args.out)
    print("| threshold | dropped | " + " | ".join(bends) + " |\n" + "|---" * (2 + len(bends)) + "|")
    for row in rows:
        print(
            f"| {row['threshold']:g} | {row['dropped']:.4f} | "
            + " | ".join(f"{e:.4f}" for e in row["bends"].values())
            + " |"
        )


if __name__ == "__main__":
    main()
