"""Writes the tables of README and docs from the kept results, between their markers.

python -m benchmarks.tables
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.markdown import table
from benchmarks.quality.calibration import calibration_table
from benchmarks.quality.video.tables import (
    video_bend,
    video_calibration,
    video_lengths,
    video_measures,
    video_quality,
    video_recommended,
    video_rules,
    video_tries,
)
from benchmarks.results import DIRECTORY

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "method.md")


def text_quality(result: dict[str, Any]) -> str:
    setup, rows = result["setup"], result["rows"]
    contexts = sorted({row["context"] for row in rows})
    of = {(row["context"], row["threshold"]): row for row in rows}
    dense = {row["context"]: row["dense_perplexity"] for row in rows}

    def cell(row: dict[str, Any]) -> str:
        return f"{row['read']:.1%}, {row['kl']:.4f}, {row['top1']:.1%}, {row['perplexity']:.2f}"

    return table(
        ["threshold", *(f"{context:,} tokens (perplexity {dense[context]:.2f})" for context in contexts)],
        (
            [f"{threshold:g}", *(cell(of[context, threshold]) for context in contexts)]
            for threshold in sorted({row["threshold"] for row in rows}, reverse=True)
        ),
        f"{setup['model']}, {setup['steps']} teacher-forced steps behind each of {len(setup['texts'])} texts (source "
        "code, and Python's manual), against dense decoding: share of the KV cache read (with summaries), mean KL "
        "divergence, same top-1, perplexity (`benchmarks/quality/text/evaluate.py`):",
    )


def text_needle(result: dict[str, Any]) -> str:
    setup, rows = result["setup"], result["rows"]
    found = {(row["context"], row["threshold"]): row["found"] for row in rows}
    found |= {(row["context"], "dense"): row["found_dense"] for row in rows}
    thresholds = sorted({row["threshold"] for row in rows})
    return table(
        ["tokens", "dense", *(f"threshold {threshold:g}" for threshold in thresholds)],
        (
            [f"{context:,}", *(str(found[context, column]) for column in ("dense", *thresholds))]
            for context in sorted({row["context"] for row in rows})
        ),
        f"Needles found out of {setup['needles']}, a number planted at a random depth of Python's manual "
        "(`benchmarks/quality/text/needle.py`):",
    )


def text_calibration(result: dict[str, Any]) -> str:
    setup = result["setup"]
    pieces, texts, others = setup["pieces"], setup["texts"], setup["held_out"]
    return calibration_table(
        result,
        f"{setup['model']} in vLLM, {setup['dtype']}: thresholds found behind {pieces * len(texts)} prompts of "
        f"{setup['context']:,} tokens ({', '.join(texts)}), and what they cost behind {pieces * len(others)} of other "
        f"texts ({', '.join(others)}), answers of {setup['max_tokens']} tokens; means over the layers "
        "(`benchmarks/quality/text/calibrate.py`):",
        held_out="on the other texts",
        digits=3,
    )


def decode_time(result: dict[str, Any]) -> str:
    machine, setup = result["machine"], result["setup"]
    reads = sorted({round(row["read"], 2) for row in result["rows"]}, reverse=True)
    speeds = {(row["shape"], round(row["read"], 2)): row["speedup"] for row in result["rows"]}
    return table(
        ["blocks read", *(f"{read:.0%}" for read in reads)],
        (
            [shape, *(_times(speeds.get((shape, read))) for read in reads)]
            for shape in dict.fromkeys(row["shape"] for row in result["rows"])
        ),
        f"Speed of the CPU decode kernel against vLLM's CPU_ATTN in the same process, one sequence of "
        f"{setup['tokens']:,} tokens, {setup['dtype']}, {machine['threads']} threads of an {machine['processor']} "
        "(`benchmarks/decode_time.py`):",
    )


def decode_time_cuda(result: dict[str, Any]) -> str:
    machine, setup = result["machine"], result["setup"]
    return table(
        ["sequences × context", "blocks read", "µs", "against FlashAttention 3", "of the bandwidth"],
        (
            [
                f"{row['sequences']} × {row['tokens']:,}",
                "all, every row disabled" if row["share"] is None else f"{row['read']:.1%}",
                f"{1e3 * row['milliseconds']:.0f}",
                _times(row["speedup"]),
                f"{row['bandwidth']:.0%}",
            ]
            for row in result["rows"]
        ),
        f"Speed of the decode kernel on one {machine['processor']}, in CUDA graphs: against vLLM's paged "
        "FlashAttention 3 in the same process, and the bytes read a second as a share of what PyTorch reads "
        f"({setup['bandwidth'] / 1e12:.2f} TB/s); {setup['heads']} query and {setup['kv_heads']} KV heads of "
        f"{setup['head_dim']}, pages of {setup['page_size']} (`benchmarks/decode_time_cuda.py`, which also says how "
        "the blocks that are read lie):",
    )


def engine_time(result: dict[str, Any]) -> str:
    machine, setup = result["machine"], result["setup"]
    names = {"stock": f"all, by {setup['stock']}", "disabled": "all, every request disabled"}
    return table(
        ["sequences × context", "blocks read", "ms a step", f"against {setup['stock']}"],
        (
            [
                f"{row['batch']} × {row['context']:,}",
                names[row["run"]] if row["read"] is None else f"{row['read']:.1%}",
                f"{row['milliseconds']:.1f}",
                _times(row["speedup"]),
            ]
            for row in sorted(result["rows"], key=lambda row: row["context"])
        ),
        f"A decode step of vLLM {result['versions']['vllm']} on one {machine['processor']}, default settings, "
        f"{setup['model']} with random weights, {setup['layers']} layers, against {setup['stock']} (FlashAttention 3); "
        f"which blocks are read is forced (`benchmarks/engine_time.py`):",
    )


def forward_dense(result: dict[str, Any]) -> str:
    tracking = {
        (_shape(row), row["call"]): row["against_dense"] for row in result["rows"] if row["group"] == "tracking"
    }
    return table(
        ["head size", "tokens × heads", "TFLOP/s", "against FlashAttention 3", "`running_max`", "`mass`"],
        (
            [
                *_shape(row),
                f"{row['tflops']:.0f}",
                _times(row["against_fa3"]),
                *(_times(tracking.get((_shape(row), rule))) for rule in ("running_max", "mass")),
            ]
            for row in result["rows"]
            if row["group"] == "dense" and row["call"] == "dense"
        ),
        f"Speed without skipping, {result['setup']['dtype']} on one {result['machine']['processor']}: against "
        "FlashAttention 3 in the same process, and, while a rule decides in every block and clears none, against not "
        "deciding (`benchmarks/forward_time.py`):",
    )


SKIPPING = ("head size", "tokens × heads", "blocks skipped", "speed", "of the ideal", "against FlashAttention 3")


def _skipping_row(share: str, rows: list[dict[str, Any]]) -> list[str]:
    """The cells of `SKIPPING`; of several rows of one shape the figures stand side by side."""
    figures = [
        [_times(row["against_dense"]) for row in rows],
        [f"{row['of_ideal']:.0%}" for row in rows],
        [_times(row["against_fa3"]) for row in rows],
    ]
    return [*_shape(rows[0]), share, *(", ".join(filter(None, figure)) for figure in figures)]


def forward_sparse(result: dict[str, Any]) -> str:
    pairs: dict[tuple[tuple[str, str], float], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        if row["group"] == "sparse":
            pairs.setdefault((_shape(row), row["share"]), []).append(row)
    return table(
        SKIPPING,
        (_skipping_row(f"{share:.0%}", pair) for (_, share), pair in pairs.items()),
        f"Speed while blocks are skipped, {result['setup']['dtype']} on one {result['machine']['processor']}: "
        "against the same kernel without skipping (the ideal is 1 / (1 - share)) and against FlashAttention 3; blocks "
        "chosen at random one by one, then in runs of 8 (`benchmarks/forward_time.py`):",
    )


def forward_skewed(result: dict[str, Any]) -> str:
    return table(
        SKIPPING,
        (_skipping_row(f"{row['skipped']:.0%}", [row]) for row in result["rows"]),
        "The same where some rows of the mask keep many times what others do (log-normal, the logarithm's deviation is "
        f"1), {result['setup']['dtype']} on one {result['machine']['processor']} (`benchmarks/forward_time.py`):",
    )


def forward_summaries(result: dict[str, Any]) -> str:
    return table(
        ["head size", "tokens × heads", "blocks skipped", "comes back", "`mass_summaries`, ms", "more than `mass`"],
        (
            [
                *_shape(row),
                f"{row['share']:.0%}",
                row["comes_back"],
                f"{row['milliseconds']:.2f}",
                f"{row['share_of_dense']:.1%}",
            ]
            for row in result["rows"]
            if "comes_back" in row
        ),
        "What it costs that summaries stand in for skipped blocks, as a share of the time of dense attention; where "
        "everything comes back in the next step, and where nothing does, as in a settled sequence of steps "
        f"({result['setup']['dtype']} on one {result['machine']['processor']}, `benchmarks/forward_time.py`):",
    )


def wan_step_time(result: dict[str, Any]) -> str:
    setup, versions = result["setup"], result["versions"]
    names = {"stock": "none, by FLASH_ATTN", "off": "none, LITE_ATTN disabled", "0": "none, deciding in each"}
    of_step = ["kernel alone", "step at most, with this kernel", "with an ideal one"]
    return table(
        ["video", "self-attention takes", "blocks skipped", "seconds a step", "against FLASH_ATTN", *of_step],
        (
            [
                f"{row['size'].replace('x', ' × ')}, {row['tokens']:,} tokens",
                f"{row['attention']:.0%}",
                names.get(row["run"]) or f"{row['skipped']:.0%}",
                f"{row['milliseconds'] / 1e3:.2f}",
                *(_times(row.get(name)) for name in ("speedup", "kernel_speedup", "ceiling", "ideal")),
            ]
            for row in result["rows"]
            if row["run"] != "none"
        ),
        f"A denoising step of the transformer of Wan2.1-14B ({setup['layers']} layers, {setup['heads']} heads of 128) "
        f"with random weights in vLLM-Omni {versions['vllm-omni']} on one {result['machine']['processor']}, batch 1, "
        f"blocks {'compiled' if setup['compiled'] else 'not compiled'}, against FLASH_ATTN (FlashAttention 3); which "
        "blocks are skipped is forced, one by one at random. Beside it what the whole step can gain by Amdahl's law, "
        "with the speed-up of the kernel alone and if what is skipped cost nothing (`benchmarks/wan_step_time.py`):",
    )


def _shape(row: dict[str, Any]) -> tuple[str, str]:
    """Two cells: head size, and tokens × heads."""
    batch = f"{row['batch']} × " if row["batch"] > 1 else ""
    more = (" causal" if row["causal"] else "") + (f", scores spread {row['spread']}" if row["spread"] > 1 else "")
    return str(row["head_dim"]), f"{batch}{row['tokens']:,} × {row['heads']}{more}"


def _times(speed: float | None) -> str:
    return "" if speed is None else f"{speed:.2f} x"


RESULTS: dict[Callable[..., str], tuple[str, ...]] = {
    text_quality: ("text_quality",),
    text_needle: ("text_needle",),
    text_calibration: ("text_calibration",),
    video_rules: ("video_quality",),
    video_quality: ("video_quality",),
    video_measures: ("video_quality",),
    video_recommended: ("video_quality",),
    video_tries: ("video_quality_tries", "video_quality_tries_8"),
    video_lengths: ("video_quality_tries", "video_quality_tries_8"),
    video_calibration: ("video_calibration",),
    video_bend: ("video_bend",),
    decode_time: ("decode_time",),
    decode_time_cuda: ("decode_time_cuda",),
    engine_time: ("engine_time",),
    forward_dense: ("forward_time",),
    forward_sparse: ("forward_time",),
    forward_skewed: ("forward_skewed",),
    forward_summaries: ("forward_summaries",),
    wan_step_time: ("wan_step_time",),
}


def main() -> None:
    pages = {page: page.read_text() for page in PAGES}
    for make, results in RESULTS.items():
        name, kept = make.__name__, [DIRECTORY / f"{result}.json" for result in results]
        if missing := [path for path in kept if not path.exists()]:
            print(f"{missing[0]}: not there, table {name} stays as it is")
            continue
        made = make(*(json.loads(path.read_text()) for path in kept))
        pattern = rf"(<!-- table {name} -->\n).*?(<!-- end -->)"
        times = 0
        for page, text in pages.items():
            pages[page], found = re.subn(pattern, lambda m, made=made: f"{m[1]}{made}\n{m[2]}", text, flags=re.DOTALL)
            times += found
        if not times:
            raise SystemExit(f"{', '.join(map(str, PAGES))}: expected a marker <!-- table {name} -->")
    for page, text in pages.items():
        page.write_text(text)


if __name__ == "__main__":
    main()
