"""Runs the CUDA operators under NVIDIA's compute-sanitizer and keeps what it says.

Without --once, this starts itself once for each tool (memcheck, racecheck, synccheck) with PyTorch's memory cache
off, so that every tensor is an allocation of its own and a read past its end is seen. With --once it runs a grid of
small shapes a single time, to be put behind a tool by hand.

Examples:
    python -m benchmarks.sanitize forward
    python -m benchmarks.sanitize decode --tools racecheck --head-dims 128
    compute-sanitizer --tool memcheck python -m benchmarks.sanitize decode --once --head-dims 64
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.results import DIRECTORY, write_result
from lite_attention import ops
from lite_attention.options import Rule
from lite_attention.ranges import pack_bits
from lite_attention.tiles import BLOCK_K, DECODE_BLOCK, TILE_Q, ceil_div, mask_words

TOOLS = ("memcheck", "racecheck", "synccheck")
HEAD_DIMS = (64, 96, 128, 192, 256)
DTYPES = (torch.bfloat16, torch.float16)


class Forward(NamedTuple):
    """A case of `lite_attention::forward`."""

    name: str
    tokens_q: int = 256
    tokens_k: int = 320
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    rule: Rule | None = None
    causal: bool = False

    def run(self, head_dim: int, dtype: torch.dtype) -> None:
        """Two steps; inputs are made on the CPU, so that few other kernels run under the tool."""
        random = torch.Generator().manual_seed(0)
        query = torch.randn(self.batch, self.tokens_q, self.heads, head_dim, generator=random).to("cuda", dtype)
        shape = (2, self.batch, self.tokens_k, self.kv_heads, head_dim)
        key, value = torch.randn(shape, generator=random).to(dtype).unbind(0)
        key, value = key.to("cuda"), value.to("cuda")
        if self.rule is None:
            ops.forward(query, key, value, None, None, None, None, None, 0.125, self.causal, "running_max")
            return
        size = (self.batch, self.heads, ceil_div(self.tokens_q, TILE_Q), ceil_div(self.tokens_k, BLOCK_K))
        mask = pack_bits(torch.rand(size, generator=random) < 0.7).to("cuda")
        lse_state = torch.full((self.batch, self.heads, self.tokens_q), math.inf).to("cuda")
        thresholds = torch.tensor([-3.0, -math.inf][: self.batch]).to("cuda")
        for _ in range(2):
            ops.forward(query, key, value, mask, lse_state, thresholds, None, None, 0.125, self.causal, self.rule)


class Decode(NamedTuple):
    """A case of `lite_attention::summarize` and `decode`."""

    name: str
    lengths: tuple[int, ...]
    kv_heads: int = 2
    group: int = 4
    page: int = 16
    thresholds: tuple[float, ...] = (-5.0, -math.inf)

    def run(self, head_dim: int, dtype: torch.dtype) -> None:
        """Two steps; inputs are made on the CPU, so that few other kernels run under the tool."""
        random = torch.Generator().manual_seed(0)
        rows, heads = len(self.lengths), self.kv_heads * self.group
        row_pages = max(1, ceil_div(max(self.lengths), self.page))
        cache = torch.randn(rows * row_pages, self.page, self.kv_heads, 2 * head_dim, generator=random)
        key, value = cache.to("cuda", dtype).split(head_dim, -1)
        summaries = torch.zeros(ops.summaries_shape(key), dtype=torch.uint8).to("cuda")
        torch.ops.lite_attention.summarize(key, torch.arange(rows * row_pages * self.page).to("cuda"), summaries)
        words = mask_words(row_pages * self.page // DECODE_BLOCK)
        arguments = (
            torch.arange(rows * row_pages, dtype=torch.int32).view(rows, row_pages),
            torch.tensor(self.lengths, dtype=torch.int32),
            torch.arange(rows, dtype=torch.int32),
            torch.tensor([self.thresholds[row % len(self.thresholds)] for row in range(rows)]),
        )
        mask = torch.full((rows, self.kv_heads, words), -1, dtype=torch.int32).to("cuda")
        on_device = [tensor.to("cuda") for tensor in arguments]
        for step in range(2):
            query = torch.randn(rows, heads, head_dim, generator=random).to("cuda", dtype)
            visit_all = torch.full((rows,), step == 0).to("cuda")
            torch.ops.lite_attention.decode(query, key, value, summaries, *on_device, visit_all, mask, 0.125)


CASES: dict[str, tuple[Forward | Decode, ...]] = {
    "forward": (
        Forward("dense"),
        Forward("dense causal", 640, 650, causal=True),
        Forward("dense ragged, grouped", 129, 333, 2, 4, 2),
        Forward("dense with many keys", 256, 8210, 1, 1, 1),
        Forward("causal with many keys", 256, 8400, 1, 1, 1, causal=True),
        Forward("running_max", rule="running_max"),
        Forward("mass", rule="mass"),
        Forward("running_max causal, ragged", 200, 333, rule="running_max", causal=True),
        Forward("mass ragged, grouped", 129, 333, 2, 4, 2, rule="mass"),
        Forward("mass_summaries", rule="mass_summaries"),
        Forward("mass_summaries ragged, grouped", 129, 2333, 2, 4, 2, rule="mass_summaries"),
        Forward("one token", 1, 1, rule="mass"),
        Forward("more tiles than multiprocessors", 640, 200, 2, 16, 4, rule="running_max"),
    ),
    "decode": (
        Decode("one token", (1,)),
        Decode("ragged, with an empty row", (333, 0, 47, 1030)),
        Decode("segments", (9001, 4097), kv_heads=1),
        Decode("one query head a key head, large pages", (700, 129), group=1, page=64),
        Decode("sixteen query heads a key head", (700, 129), group=16),
        Decode("more units than scorers", (70,) * 400, group=2),
    ),
}


def run_all(cases: tuple[Forward | Decode, ...], head_dims: list[int]) -> None:
    for head_dim in head_dims:
        for dtype in DTYPES:
            for case in cases:
                case.run(head_dim, dtype)
                torch.cuda.synchronize()
                print(f"{case.name}, head size {head_dim}, {dtype}: done", flush=True)


def sanitize(operator: str, tool: str, head_dims: list[int], timeout: float) -> dict[str, Any]:
    """Run the grid under ``tool``; its summary, its exit code and, where it found something, its first words."""
    command = ["compute-sanitizer", "--tool", tool, "--target-processes", "all", "--error-exitcode", "9"]
    if tool == "synccheck":  # it follows fewer than a launch of ours has, and then says an error that is none
        command += ["--num-cuda-barriers", "65536"]
    command += ["--print-limit", "20", sys.executable, "-m", "benchmarks.sanitize", operator, "--once"]
    command += ["--head-dims", *map(str, head_dims)]
    start = time.monotonic()
    try:
        done = subprocess.run(
            command,
            env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        output, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as error:
        output, code = (error.stdout or b"").decode(), -1
    summary = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", output)
    told = [line for line in output.splitlines() if line.startswith("=====") or "Error" in line]
    return {
        "tool": tool,
        "exit_code": code,
        "summary": summary[-1] if summary else ("timed out" if code == -1 else "no summary"),
        "cases_done": output.count(": done"),
        "cases": len(head_dims) * len(DTYPES) * len(CASES[operator]),
        "seconds": round(time.monotonic() - start, 1),
        "found": "\n".join(told)[:4000] if code else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operator", choices=list(CASES))
    parser.add_argument("--once", action="store_true", help="run the grid a single time, without a tool")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--head-dims", type=int, nargs="+", default=list(HEAD_DIMS))
    parser.add_argument("--timeout", type=float, default=300, help="seconds for each tool")
    parser.add_argument("--out", type=Path, default=DIRECTORY, help="folder for OPERATOR_sanitizer.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("sanitize: expected a CUDA device, found none")
    if args.once:
        run_all(CASES[args.operator], args.head_dims)
        return
    if shutil.which("compute-sanitizer") is None:
        raise SystemExit("sanitize: expected compute-sanitizer on PATH (it comes with the CUDA toolkit)")

    rows = [sanitize(args.operator, tool, args.head_dims, args.timeout) for tool in args.tools]
    settings = {"head_dims": args.head_dims, "cases": [case.name for case in CASES[args.operator]]}
    write_result(f"{args.operator}_sanitizer", settings, rows, args.out)
    for r in rows:
        if r["found"]:
            print(r["found"])
    for r in rows:
        print(f"{r['tool']}: {r['summary']} ({r['cases_done']} of {r['cases']} cases, {r['seconds']} s)")
    if any(r["exit_code"] for r in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
