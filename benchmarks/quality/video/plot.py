"""Pictures of what skipping costs in videos, from a kept run of `benchmarks.quality.video.evaluate`.

Three pictures: PSNR, SSIM and error of motion against the threshold, the share of blocks skipped and, where there is
one, the time of attention (NAME.png); the same frames by several methods and what differs from dense, 8 times as strong
(NAME_frames.png); and how much each layer skips at each step (NAME_layers.png).

    python -m benchmarks.quality.video.plot
    python -m benchmarks.quality.video.plot --methods 'product-mass*' --bold product-mass-summaries
    python -m benchmarks.quality.video.plot --shown 'product-mass -8' 'budget -5'
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.quality.video import FOLDER
from benchmarks.quality.video.evaluate import of_one_run
from benchmarks.quality.video.sample import BRANCHES
from benchmarks.results import DIRECTORY
from lite_attention.pictures import SKIPPED, heat_map, scale

Row = dict[str, Any]
MEASURES = {"psnr": "PSNR against dense, dB", "ssim": "SSIM", "temporal_error": "error of motion"}
AMPLIFIED = 8
SHOWN_SPARSITY = 0.5
"""Without a choice, of each method that threshold is shown which comes nearest to this sparsity."""


def label(row: Row) -> str:
    """A method and its threshold, as `benchmarks.quality.methods.Method` writes it."""
    return str(row["method"]) if row["threshold"] is None else f"{row['method']} {row['threshold']:g}"


def curves(rows: Sequence[Row], title: str, bold: str | None = None) -> Figure:
    """Each measure against the threshold, the sparsity and, where there is one, the time of attention.

    Args:
        rows: of a result; those of one method are a curve.
        title: of the whole picture.
        bold: method whose curve stands out.
    """
    across = {"threshold": "threshold, as the method means it", "sparsity": SKIPPED}
    if any(row["attention_milliseconds"] for row in rows):
        across["attention_milliseconds"] = "time of attention a video, ms"
    figure, panels = plt.subplots(
        len(across), len(MEASURES), figsize=(13, 4.2 * len(across)), squeeze=False, layout="constrained"
    )
    methods = list(dict.fromkeys(row["method"] for row in rows if row["method"] != "dense"))
    for line, (quantity, name) in zip(panels, across.items(), strict=True):
        for panel, (measure, meaning) in zip(line, MEASURES.items(), strict=True):
            for number, method in enumerate(methods):
                points = [
                    (row[quantity], row[measure])
                    for row in rows
                    if row["method"] == method and row[quantity] is not None and row[measure] is not None
                ]
                style = "-" if method.startswith("product") else "--"
                if points:
                    panel.plot(*zip(*sorted(points), strict=True), style, marker="o", markersize=3.5, label=method,
                               linewidth=3 if method == bold else 1.2,
                               color=plt.get_cmap("tab10" if len(methods) <= 10 else "tab20")(number))  # fmt: skip
            panel.set_xlabel(name)
            panel.set_ylabel(meaning)
        # What skips nothing differs by rounding only.
        line[0].set_ylim(top=min(line[0].get_ylim()[1], 60))
    handles = panels[1, 0].get_legend_handles_labels()  # of all: what never skips has no threshold
    figure.legend(*handles, loc="outside right upper", fontsize=8, title="product -, emulated - -")
    figure.suptitle(title, fontsize=11)
    return figure


def frames(rows: Sequence[Row], pictures: dict[str, Tensor], title: str) -> Figure:
    """Frames of the dense clip and of others, and what differs."""
    dense = pictures["stills dense"].float() / 255
    names = ["dense", *(label(row) for row in rows)]
    figure = plt.figure(figsize=(2.4 * len(dense), 1.45 * len(names)), layout="constrained")
    notes = {label(row): f"{row['sparsity']:.0%} skipped, {_decibels(row['psnr_of_videos'][0])}" for row in rows}
    for line, name in zip(figure.subfigures(len(names), 1, squeeze=False)[:, 0], names, strict=True):
        clip = pictures[f"stills {name}"].float() / 255
        difference = 0.5 + AMPLIFIED / 2 * (clip - dense)
        panels = line.subplots(1, 2 * len(dense), squeeze=False)[0]
        for panel, picture in zip(panels, (*clip, *difference.clamp(0, 1)), strict=True):
            panel.imshow(picture.numpy())
            panel.axis("off")
        note = f"{name}: {notes[name]}" if name in notes else name
        line.suptitle(note, fontsize=8, x=0.01, horizontalalignment="left")
    figure.suptitle(f"{title}; on the right what differs from dense, x {AMPLIFIED}", fontsize=9)
    return figure


def layers(rows: Sequence[Row], pictures: dict[str, Tensor]) -> Figure:
    """Share of blocks skipped by each layer at each step of the first video, for each branch of guidance."""
    figure, panels = plt.subplots(
        len(BRANCHES), len(rows), figsize=(2.6 * len(rows) + 1, 4.6), squeeze=False, sharex=True, sharey=True,
        layout="constrained",
    )  # fmt: skip
    highest = scale([pictures[f"sparsity {label(row)}"] for row in rows])
    for column, row in zip(panels.T, rows, strict=True):
        column[0].set_title(label(row), fontsize=8)
        for panel, shares in zip(column, pictures[f"sparsity {label(row)}"].unbind(1), strict=True):
            picture = heat_map(panel, shares, highest)
    for panel, branch in zip(panels[:, 0], BRANCHES, strict=True):
        panel.set_ylabel(f"layer, {branch}")
    for panel in panels[-1]:
        panel.set_xlabel("step")
    figure.colorbar(picture, ax=panels, label=SKIPPED, shrink=0.8)
    return figure


def choose(rows: Sequence[Row], shown: Sequence[str] | None) -> list[Row]:
    """The rows that ``shown`` names; None for one threshold of each method that skips.

    Raises:
        ValueError: a name is none of the run's.
    """
    by_label = {label(row): row for row in rows}
    if shown is not None:
        if missing := [name for name in shown if name not in by_label]:
            raise ValueError(f"shown: expected some of {', '.join(by_label)}, got {missing[0]!r}")
        return [by_label[name] for name in shown]
    nearest: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: abs(row["sparsity"] - SHOWN_SPARSITY)):
        if row["sparsity"] > 0:
            nearest.setdefault(row["method"], row)
    return [row for row in rows if row is nearest.get(row["method"])][:6]


def _decibels(psnr: float | None) -> str:
    return "equal" if psnr is None else f"{psnr:.1f} dB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="video_quality", help="of the result")
    parser.add_argument("--results", type=Path, default=DIRECTORY, help="folder of NAME.json")
    parser.add_argument("--pictures", type=Path, default=FOLDER, help="folder of NAME.safetensors")
    parser.add_argument("--methods", nargs="+", default=["*"], metavar="NAME", help="or patterns: curves; default: all")
    parser.add_argument("--bold", metavar="NAME", help="method whose curve stands out")
    parser.add_argument("--shown", nargs="+", metavar="'METHOD THRESHOLD'", help="in frames and layers; default: the "
                        "first six methods, each where it comes nearest to half of the blocks skipped")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of the pictures")
    args = parser.parse_args()

    kept, tensors = args.results / f"{args.name}.json", args.pictures / f"{args.name}.safetensors"
    for path in (kept, tensors):
        if not path.exists():
            parser.error(f"{path}: expected a file of python -m benchmarks.quality.video.evaluate")
    result, pictures = json.loads(kept.read_text()), load_file(tensors)
    try:
        shown = choose(result["rows"], args.shown)
    except ValueError as error:
        parser.error(f"--{error}")
    setup, machine = result["setup"], result["machine"]["processor"]
    title = f"{setup['tokens']:,} tokens, {setup['steps']} steps, mean over videos: {setup['videos']}, {machine}"
    rows = of_one_run(result["rows"])
    drawn = [row for row in rows if any(fnmatchcase(row["method"], pattern) for pattern in args.methods)]
    made = {args.name: curves(drawn, title, args.bold)}
    if shown:
        made[f"{args.name}_frames"] = frames(shown, pictures, setup["first_video"])
        made[f"{args.name}_layers"] = layers(shown, pictures)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, figure in made.items():
        figure.savefig(args.out / f"{name}.png", dpi=100)
        print(f"wrote {args.out / name}.png")


if __name__ == "__main__":
    main()
