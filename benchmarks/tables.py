"""Writes the tables of README and docs from the kept results, between their markers.

python -m benchmarks.tables
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.quality.video.tables import (
    video_bend,
    video_calibration,
    video_lengths,
    video_measures,
    video_quality,
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
    lines = [
        f"{setup['model']}, {setup['steps']} teacher-forced steps behind each of {len(setup['texts'])} texts (source "
        "code, and Python's manual), against dense decoding: share of the KV cache read (with summaries), mean KL "
        "divergence, same top-1, perplexity (`benchmarks/quality/text/evaluate.py`):",
        "",
        "| threshold | " + " | ".join(f"{c:,} tokens (perplexity {dense[c]:.2f})" for c in contexts) + " |",
        "|---" * (len(contexts) + 1) + "|",
    ]
    for threshold in sorted({row["threshold"] for row in rows}, reverse=True):
        cells = [of[context, threshold] for context in contexts]
        shown = [f"{c['read']:.1%}, {c['kl']:.4f}, {c['top1']:.1%}, {c['perplexity']:.2f}" for c in cells]
        lines.append(f"| {threshold:g} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def text_needle(result: dict[str, Any]) -> str:
    setup, rows = result["setup"], result["rows"]
    contexts = sorted({row["context"] for row in rows})
    found = {(row["context"], row["threshold"]): row["found"] for row in rows}
    found |= {(row["context"], "dense"): row["found_dense"] for row in rows}
    thresholds = sorted({row["threshold"] for row in rows})
    lines = [
        f"Needles found out of {setup['needles']}, a number planted at a random depth of Python's manual "
        "(`benchmarks/quality/text/needle.py`):",
        "",
        "| tokens | dense | " + " | ".join(f"threshold {threshold:g}" for threshold in thresholds) + " |",
        "|---" * (len(thresholds) + 2) + "|",
    ]
    for context in contexts:
        cells = (str(found[context, column]) for column in ("dense", *thresholds))
        lines.append(f"| {context:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def text_calibration(result: dict[str, Any]) -> str:
    setup = result["setup"]
    pieces, texts, others = setup["pieces"], setup["texts"], setup["held_out"]
    lines = [
        f"{setup['model']} in vLLM, {setup['dtype']}: thresholds found behind {pieces * len(texts)} prompts of "
        f"{setup['context']:,} tokens ({', '.join(texts)}), and what they cost behind {pieces * len(others)} of other "
        f"texts ({', '.join(others)}), answers of {setup['max_tokens']} tokens; means over the layers "
        "(`benchmarks/quality/text/calibrate.py`):",
        "",
        f"| target | reached | on the other texts | layers within {setup['within']:.0%} of it | blocks skipped |",
        "|---" * 5 + "|",
    ]
    lines += [
        f"| {row['quantity']} = {row['target']:g} | {row['reached']:.3f} | {row['held_out']:.3f} | "
        f"{row['layers_within']:.0%} | {row['sparsity']:.0%} |"
        for row in result["rows"]
    ]
    return "\n".join(lines)


def decode_time(result: dict[str, Any]) -> str:
    machine, setup = result["machine"], result["setup"]
    shapes = list(dict.fromkeys(row["shape"] for row in result["rows"]))
    reads = sorted({round(row["read"], 2) for row in result["rows"]}, reverse=True)
    speeds = {(row["shape"], round(row["read"], 2)): row["speedup"] for row in result["rows"]}
    lines = [
        f"Speed of the CPU decode kernel against vLLM's CPU_ATTN in the same process, one sequence of "
        f"{setup['tokens']:,} tokens, {setup['dtype']}, {machine['threads']} threads of an {machine['processor']} "
        "(`benchmarks/decode_time.py`):",
        "",
        "| blocks read | " + " | ".join(f"{read:.0%}" for read in reads) + " |",
        "|---" * (len(reads) + 1) + "|",
    ]
    for shape in shapes:
        cells = (f"{speeds[shape, read]:.2f} x" if (shape, read) in speeds else "" for read in reads)
        lines.append(f"| {shape} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def decode_time_cuda(result: dict[str, Any]) -> str:
    machine, setup = result["machine"], result["setup"]
    lines = [
        f"Speed of the decode kernel on one {machine['processor']}, in CUDA graphs: against vLLM's paged "
        "FlashAttention 3 in the same process, and the bytes read a second as a share of what PyTorch reads "
        f"({setup['bandwidth'] / 1e12:.2f} TB/s); {setup['heads']} query and {setup['kv_heads']} KV heads of "
        f"{setup['head_dim']}, pages of {setup['page_size']} (`benchmarks/decode_time_cuda.py`, which also says how "
        "the blocks that are read lie):",
        "",
        "| sequences × context | blocks read | µs | against FlashAttention 3 | of the bandwidth |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        read = "all, every row disabled" if row["share"] is None else f"{row['read']:.1%}"
        lines.append(
            f"| {row['sequences']} × {row['tokens']:,} | {read} | {1e3 * row['milliseconds']:.0f} "
            f"| {_times(row['speedup'])} | {row['bandwidth']:.0%} |"
        )
    return "\n".join(lines)


def engine_time(result: dict[str, Any]) -> str:
    machine, setup = result["machine"], result["setup"]
    lines = [
        f"A decode step of vLLM {result['versions']['vllm']} on one {machine['processor']}, default settings, "
        f"{setup['model']} with random weights, {setup['layers']} layers, against {setup['stock']} (FlashAttention 3); "
        f"which blocks are read is forced (`benchmarks/engine_time.py`):",
        "",
        f"| sequences × context | blocks read | ms a step | against {setup['stock']} |",
        "|---|---|---|---|",
    ]
    names = {"stock": f"all, by {setup['stock']}", "disabled": "all, every request disabled"}
    for row in result["rows"]:
        read = names.get(row["run"], row["run"].removesuffix(" read"))
        case = f"{row['batch']} × {row['context']:,}"
        lines.append(f"| {case} | {read} | {row['milliseconds']:.1f} | {_times(row['speedup'])} |")
    return "\n".join(lines)


def forward_dense(result: dict[str, Any]) -> str:
    rows = [row for row in result["rows"] if row["group"] == "dense" and row["call"] == "dense"]
    tracking = {
        (_shape(row), row["call"]): row["against_dense"] for row in result["rows"] if row["group"] == "tracking"
    }
    lines = [
        f"Speed without skipping, {result['setup']['dtype']} on one {result['machine']['processor']}: against "
        "FlashAttention 3 in the same process, and, while a rule decides in every block and clears none, against not "
        "deciding (`benchmarks/forward_time.py`):",
        "",
        "| head size | tokens × heads | TFLOP/s | against FlashAttention 3 | `running_max` | `mass` |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        figures = [row["against_fa3"], *(tracking.get((_shape(row), rule)) for rule in ("running_max", "mass"))]
        lines.append(f"| {_shape(row)} | {row['tflops']:.0f} | " + " | ".join(map(_times, figures)) + " |")
    return "\n".join(lines)


def forward_sparse(result: dict[str, Any]) -> str:
    rows = [row for row in result["rows"] if row["group"] == "sparse"]
    lines = [
        f"Speed while blocks are skipped, {result['setup']['dtype']} on one {result['machine']['processor']}: "
        "against the same kernel without skipping (the ideal is 1 / (1 - share)) and against FlashAttention 3; blocks "
        "chosen at random one by one, then in runs of 8 (`benchmarks/forward_time.py`):",
        "",
        "| head size | tokens × heads | blocks skipped | speed | of the ideal | against FlashAttention 3 |",
        "|---|---|---|---|---|---|",
    ]
    pairs: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        pairs.setdefault((_shape(row), row["share"]), []).append(row)
    for (shape, share), pair in pairs.items():
        columns = [
            [_times(row["against_dense"]) for row in pair],
            [f"{row['of_ideal']:.0%}" for row in pair],
            [_times(row["against_fa3"]) for row in pair],
        ]
        lines.append(
            f"| {shape} | {share:.0%} | " + " | ".join(", ".join(filter(None, column)) for column in columns) + " |"
        )
    return "\n".join(lines)


def forward_skewed(result: dict[str, Any]) -> str:
    lines = [
        "The same where some rows of the mask keep many times what others do (log-normal, the logarithm's deviation is "
        f"1), {result['setup']['dtype']} on one {result['machine']['processor']} (`benchmarks/forward_time.py`):",
        "",
        "| head size | tokens × heads | blocks skipped | speed | of the ideal | against FlashAttention 3 |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        figures = [_times(row["against_dense"]), f"{row['of_ideal']:.0%}", _times(row["against_fa3"])]
        lines.append(f"| {_shape(row)} | {row['skipped']:.0%} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def forward_summaries(result: dict[str, Any]) -> str:
    lines = [
        "What it costs that summaries stand in for skipped blocks, as a share of the time of dense attention "
        f"({result['setup']['dtype']} on one {result['machine']['processor']}, `benchmarks/forward_time.py`):",
        "",
        "| head size | tokens × heads | blocks skipped | `mass_summaries`, ms | of dense, more than `mass` |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        if row["call"].endswith("mass_summaries"):
            figures = [f"{row['milliseconds']:.2f}", f"{row['share_of_dense']:.1%}"]
            lines.append(f"| {_shape(row)} | {row['share']:.0%} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def wan_step_time(result: dict[str, Any]) -> str:
    setup, versions = result["setup"], result["versions"]
    lines = [
        f"A denoising step of the transformer of Wan2.1-14B ({setup['layers']} layers, {setup['heads']} heads of 128) "
        f"with random weights in vLLM-Omni {versions['vllm-omni']} on one {result['machine']['processor']}, batch 1, "
        f"blocks {'compiled' if setup['compiled'] else 'not compiled'}, against FLASH_ATTN (FlashAttention 3); which "
        "blocks are skipped is forced, one by one at random. Beside it what the whole step can gain by Amdahl's law, "
        "with the speed-up of the kernel alone and if what is skipped cost nothing (`benchmarks/wan_step_time.py`):",
        "",
        "| video | self-attention takes | blocks skipped | seconds a step | against FLASH_ATTN | kernel alone "
        "| step at most, with this kernel | with an ideal one |",
        "|---|---|---|---|---|---|---|---|",
    ]
    names = {"stock": "none, by FLASH_ATTN", "off": "none, LITE_ATTN disabled", "0": "none, deciding in each"}
    for row in result["rows"]:
        if row["run"] == "none":
            continue
        skipped = names.get(row["run"]) or f"{row['skipped']:.0%}"
        columns = (row.get(name) for name in ("speedup", "kernel_speedup", "ceiling", "ideal"))
        lines.append(
            f"| {row['size'].replace('x', ' × ')}, {row['tokens']:,} tokens | {row['attention']:.0%} | {skipped} "
            f"| {row['milliseconds'] / 1e3:.2f} | " + " | ".join(map(_times, columns)) + " |"
        )
    return "\n".join(lines)


def _shape(row: dict[str, Any]) -> str:
    """Two cells: head size, and tokens × heads."""
    batch = f"{row['batch']} × " if row["batch"] > 1 else ""
    more = (" causal" if row["causal"] else "") + (f", scores spread {row['spread']}" if row["spread"] > 1 else "")
    return f"{row['head_dim']} | {batch}{row['tokens']:,} × {row['heads']}{more}"


def _times(speed: float | None) -> str:
    return "" if speed is None else f"{speed:.2f} x"


RESULTS: dict[Callable[..., str], tuple[str, ...]] = {
    text_quality: ("text_quality",),
    text_needle: ("text_needle",),
    text_calibration: ("text_calibration",),
    video_rules: ("video_quality",),
    video_quality: ("video_quality",),
    video_measures: ("video_quality",),
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
        table = make(*(json.loads(path.read_text()) for path in kept))
        pattern = rf"(<!-- table {name} -->\n).*?(<!-- end -->)"
        times = 0
        for page, text in pages.items():
            pages[page], found = re.subn(
                pattern, lambda m, table=table: f"{m[1]}{table}\n{m[2]}", text, flags=re.DOTALL
            )
            times += found
        if not times:
            raise SystemExit(f"{', '.join(map(str, PAGES))}: expected a marker <!-- table {name} -->")
    for page, text in pages.items():
        page.write_text(text)


if __name__ == "__main__":
    main()
