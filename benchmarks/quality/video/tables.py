"""Tables of what skipping costs in videos, in Markdown, for `benchmarks.tables`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from benchmarks.markdown import table
from benchmarks.quality.calibration import calibration_table
from benchmarks.quality.video.evaluate import Measure, at_quality, of_one_run
from lite_attention.tiles import BLOCK_K, ceil_div

Result = dict[str, Any]

PRODUCT = {
    "product-running-max": "`running_max`",
    "product-mass": "`mass`",
    "product-mass-summaries": "`mass_summaries`",
    "product-mass-warmup": "`mass`, 5 dense steps first, 2 last",
    "product-running-max-rising-4": "`running_max`, 3 dense steps first, threshold rises by 4 over the steps",
    "product-mass-summaries-rising-4": "`mass_summaries`, the same",
    "product-mass-rising-2": "`mass`, 3 dense steps first, threshold rises by 2",
    "product-mass-rising-4": "the same, rises by 4",
    "product-mass-rising-6": "the same, rises by 6",
    "product-mass-rising-4-warmup-5": "**`mass`, 5 dense steps first, threshold rises by 4**",
}
RECOMMENDED = "product-mass-rising-4-warmup-5"
PUBLISHED = "running-max-176"
SHOWN = PRODUCT | {PUBLISHED: "`running_max`, tiles of 128 x 176 as published, emulated"}
OTHER_MEASURES: dict[Measure, tuple[str, tuple[float, ...]]] = {
    "ssim": ("SSIM", (0.99, 0.975)),
    "temporal_error": ("error of motion", (0.2, 0.4)),
}
TRIES = {
    PUBLISHED: "`running_max`, blocks of 176 keys as published",
    "product-running-max": "`running_max`",
    "running-max-heaviest": "`running_max`, the heaviest block of the step before visited first",
    "in-pass": "skipping in the pass: what lies so far below the running maximum takes no part at once; alone",
    "in-pass-heaviest": "the same, heaviest block first",
    "mass-in-pass-3": "`mass`, and skipping in the pass 3 below its threshold",
    "product-mass-refresh-8": "`mass`, all blocks every 8 steps",
    "mass-rotating-8": "`mass`, each step an eighth of the blocks",
    "budget": "budget of the dropped mass: mean over a tile's rows",
    "budget-binned": "the same without a sort, 32 bins of the share",
    "budget-worst-row": "the same, the row that loses most",
    "mass-mean": "`mass` with summaries, keys at their mean",
    "mass-variance": "`mass` with summaries, mean and variance without a bend",
    "mass-variance-32": "the same, blocks of 32 keys",
    "product-mass-warmup": "`mass`, 7 dense steps first, 2 last",
}


def video_rules(result: Result) -> str:
    setup, rows = result["setup"], of_one_run(result["rows"])
    of = {(row["method"], row["threshold"]): row for row in rows}
    columns = {name: PRODUCT[name] for name in list(PRODUCT)[:3]} | {
        RECOMMENDED: "`mass`, 5 dense steps, rising from this by 4 over the steps"
    }
    shown = {name: column for name, column in columns.items() if any(row["method"] == name for row in rows)}
    dense = of["dense", None]["attention_milliseconds"]
    return table(
        ["threshold", *shown.values()],
        (
            [f"{threshold:g}", *(_video_cell(of.get((name, threshold)), dense) for name in shown)]
            for threshold in sorted({threshold for name, threshold in of if name in shown and threshold % 1 == 0})
        ),
        f"What skipping costs our video model ({setup['tokens']:,} tokens, {setup['steps']} steps, held-out labels, "
        f"videos: {setup['videos']}) on one {result['machine']['processor']}, against dense attention from the same "
        "noise: PSNR, share of the blocks skipped over all steps, and speed of all attention against PyTorch's dense "
        "one (`benchmarks/quality/video/evaluate.py`):",
    )


def _video_cell(row: Result | None, dense: float | None) -> str:
    if row is None:
        return ""
    psnr = "equal" if row["psnr"] is None else f"{row['psnr']:.1f} dB"
    return ", ".join(filter(None, (psnr, f"{row['sparsity']:.0%}", _speed(row, dense))))


def _speed(row: Result, dense: float | None) -> str:
    """Of attention; empty where it was not timed."""
    return f"{dense / row['attention_milliseconds']:.2f} x" if dense and row["attention_milliseconds"] else ""


def video_quality(result: Result) -> str:
    rows = of_one_run(result["rows"])
    of_dense = {row["method"]: row["attention_milliseconds"] for row in rows if row["threshold"] is None}
    dense = [milliseconds for milliseconds in of_dense.values() if milliseconds is not None]
    timed = len(dense) == 2
    found = {decibels: at_quality(rows, decibels) for decibels in (40.0, 33.0)}
    columns = ["skipped", "against published", *(["attention, speed"] if timed else [])]
    speeds = ""
    if timed:
        ours = f"and our own ({dense[1]:.0f} ms)"
        speeds = f"; speed of all attention against PyTorch's dense ({dense[0]:.0f} ms a video), {ours}"

    def cells(name: str) -> Iterator[str]:
        for at in found.values():
            sparsity, milliseconds = at.get(name, (None, None))
            published, _ = at.get(PUBLISHED, (None, None))
            yield "" if sparsity is None else f"{sparsity:.1%}"
            yield "" if sparsity is None or published is None else f"{sparsity / published:.2f} x"
            if timed:
                yield "" if milliseconds is None else ", ".join(f"{whole / milliseconds:.2f} x" for whole in dense)

    return table(
        ["", *(f"{column} at {decibels:.0f} dB" for decibels in found for column in columns)],
        _where_known(SHOWN, cells),
        f"Share of the blocks skipped at the same PSNR, interpolated between two thresholds, videos: "
        f"{result['setup']['videos']}, {result['setup']['tokens']:,} tokens{speeds}:",
    )


def _where_known(meanings: dict[str, str], cells: Callable[[str], Iterable[str]]) -> Iterator[list[str]]:
    """Rows of a table, of the methods of which anything is known: what they mean, and their cells."""
    for name, meaning in meanings.items():
        known = list(cells(name))
        if any(known):
            yield [meaning, *known]


def video_recommended(result: Result) -> str:
    rows = of_one_run(result["rows"])
    (dense,) = (row["attention_milliseconds"] for row in rows if row["method"] == "dense")
    blocks = ceil_div(result["setup"]["tokens"], BLOCK_K)
    return table(
        ["first value", "for any length, if it carries over", "PSNR", "SSIM", "blocks skipped", "attention"],
        (
            [
                f"{row['threshold']:g}",
                f"{row['threshold'] + math.log2(blocks):.1f} - log2(blocks)",
                f"{row['psnr']:.1f} dB",
                f"{row['ssim']:.3f}",
                f"{row['sparsity']:.0%}",
                _speed(row, dense),
            ]
            for row in sorted(rows, key=lambda row: row["threshold"] or 0)
            if row["method"] == RECOMMENDED and row["threshold"] % 0.5 == 0
        ),
    )


def video_measures(result: Result) -> str:
    found = {
        f"{meaning} {quality:g}": at_quality(result["rows"], quality, measure)
        for measure, (meaning, qualities) in OTHER_MEASURES.items()
        for quality in qualities
    }

    def cells(name: str) -> Iterator[str]:
        for at in found.values():
            sparsity, published = (at.get(method, (None, None))[0] for method in (name, PUBLISHED))
            against = "" if sparsity is None or published is None else f", {sparsity / published:.2f} x"
            yield "" if sparsity is None else f"{sparsity:.1%}{against}"

    return table(
        ["", *found],
        _where_known(SHOWN, cells),
        "Share of the blocks skipped at the same SSIM, and error of motion, and as a multiple of the published rule's:",
    )


def video_tries(*results: Result) -> str:
    return table(
        ["", *(f"{result['setup']['tokens']:,} tokens" for result in results)],
        _where_known(TRIES, lambda name: (_against_mass(result["rows"], name) for result in results)),
        "Blocks skipped, as a multiple of what `mass` skips at the same PSNR, and over which range of PSNR (one "
        f"threshold: one figure), videos: {results[0]['setup']['videos']}:",
    )


def _against_mass(rows: list[Result], name: str) -> str:
    mass = [row for row in rows if row["method"] == "product-mass"]
    known = [
        (row["sparsity"] / at[0], row["psnr"])
        for row in rows
        if row["method"] == name and row["psnr"] and (at := at_quality(mass, row["psnr"]).get("product-mass"))
    ]
    if not known:
        return ""
    (low, high), (worst, best) = ((min(numbers), max(numbers)) for numbers in zip(*known, strict=True))
    if len(known) == 1:
        return f"{low:.2f} ({best:.0f} dB)"
    return f"{low:.2f} to {high:.2f} ({worst:.0f} to {best:.0f} dB)"


def video_lengths(long: Result, short: Result) -> str:
    tokens = [result["setup"]["tokens"] for result in (short, long)]
    of_short, of_long = ({(row["method"], row["threshold"]): row for row in result["rows"]} for result in (short, long))
    relative = math.log2(tokens[1] / tokens[0])

    def cells(name: str, shift: float) -> Iterator[str]:
        pairs = [
            (threshold, row["dropped"], of_long[name, threshold - shift]["dropped"])
            for (method, threshold), row in of_short.items()
            if method == name and threshold % 1 == 0 and (name, threshold - shift) in of_long
        ]
        yield ", ".join(f"{threshold:g}" for threshold, _, _ in pairs)
        yield ", ".join(f"{of_short:.2%}" for _, of_short, _ in pairs)
        yield ", ".join(f"{of_long:.2%}" for _, _, of_long in pairs)
        yield ", ".join(f"{of_long / of_short:.2f}" for _, of_short, of_long in pairs)

    return table(
        [
            "means the same at both lengths",
            f"at {tokens[0]:,} tokens",
            "dropped there",
            f"dropped at {tokens[1]:,} tokens",
            "ratio",
        ],
        (
            [form, *cells(name, shift)]
            for form, name, shift in (
                ("`mass`, a share", "product-mass", 0.0),
                ("`mass`, a multiple of the share of a block in a uniform softmax", "product-mass", relative),
                ("budget of the whole dropped mass", "budget", 0.0),
            )
        ),
    )


def video_calibration(result: Result) -> str:
    setup = result["setup"]
    return calibration_table(
        result,
        f"Our video model, {setup['tokens']:,} tokens, {setup['steps']} steps, rule `{setup['rule']}`: thresholds "
        f"found on {setup['videos']} videos, and what they cost in {setup['held_out_videos']} with held-out labels; "
        "means over the layers (`benchmarks/quality/video/calibrate.py`):",
        held_out="held out",
        digits=4,
    )


def video_bend(result: Result) -> str:
    bends = list(result["rows"][0]["bends"])
    names = {"0": "mean alone", "infinite": "v / 2"}
    return table(
        ["blocks up to a share of", "dropped", *(names.get(bend, f"A = {bend}") for bend in bends)],
        (
            [f"2^{row['threshold']:g}", f"{row['dropped']:.4f}", *(f"{row['bends'][bend]:.4f}" for bend in bends)]
            for row in result["rows"]
        ),
    )
