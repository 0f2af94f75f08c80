"""Writes the README's tables from the kept results, between their markers.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.results import DIRECTORY

README = Path(__file__).parents[1] / "README.md"


def decode_quality(result: dict[str, Any]) -> str:
    setup = result["setup"]
    lines = [
        f"{setup['model']} behind {setup['context']:,} tokens of source code, {setup['steps']} teacher-forced steps on "
        f"each of {len(setup['texts'])} texts, against dense decoding (`benchmarks/decode_quality.py`):",
        "",
        "| threshold | KV cache read (with summaries) | mean KL | same top-1 |",
        "|---|---|---|---|",
    ]
    lines += [f"| {r['threshold']:g} | {r['read']:.1%} | {r['kl']:.4f} | {r['top1']:.1%} |" for r in result["rows"]]
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


def main() -> None:
    text = README.read_text()
    for make in (decode_quality, decode_time):
        name = make.__name__
        table = make(json.loads((DIRECTORY / f"{name}.json").read_text()))
        pattern = rf"(<!-- table {name} -->\n).*?(<!-- end -->)"
        text, found = re.subn(pattern, lambda m, table=table: f"{m[1]}{table}\n{m[2]}", text, flags=re.DOTALL)
        if not found:
            raise SystemExit(f"{README}: expected a marker <!-- table {name} -->")
    README.write_text(text)


if __name__ == "__main__":
    main()
