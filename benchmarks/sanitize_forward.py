"""Runs `lite_attention::forward` under NVIDIA's compute-sanitizer and keeps what it says.

Without --once, this starts itself once for each tool (memcheck, racecheck, synccheck) with PyTorch's memory cache
off, so that every tensor is an allocation of its own and a read past its end is seen. With --once it runs a grid of
small shapes a single time, to be put behind a tool by hand.

Examples:
    python -m benchmarks.sanitize_forward
    python -m benchmarks.sanitize_forward --tools racecheck --head-dims 128
    compute-sanitizer --tool memcheck python -m benchmarks.sanitize_forward --once --head-dims 64
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
from lite_attention.tiles import BLOCK_K, TILE_Q, ceil_div

TOOLS = ("memcheck", "racecheck", "synccheck")
HEAD_DIMS = (64, 96, 128, 192, 256)
DTYPES = (torch.bfloat16, torch.float16)


class Case(NamedTuple):
    name: str
    tokens_q: int = 256
    tokens_k: int = 320
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    rule: Rule | None = None
    causal: bool = False


CASES = (
    Case("dense"),
    Case("dense causal", 640, 650, causal=True),
    Case("dense ragged, grouped", 129, 333, 2, 4, 2),
    Case("dense with many keys", 256, 8210, 1, 1, 1),
    Case("running_max", rule="running_max"),
    Case("mass", rule="mass"),
    Case("running_max causal, ragged", 200, 333, rule="running_max", causal=True),
    Case("mass ragged, grouped", 129, 333, 2, 4, 2, rule="mass"),
    Case("one token", 1, 1, rule="mass"),
    Case("more tiles than multiprocessors", 640, 200, 2, 16, 4, rule="running_max"),
)


def run(case: Case, head_dim: int, dtype: torch.dtype) -> None:
    """Two steps of a case; inputs are made on the CPU, so that few other kernels run under the tool."""
    random = torch.Generator().manual_seed(0)
    query = torch.randn(case.batch, case.tokens_q, case.heads, head_dim, generator=random).to("cuda", dtype)
    shape = (2, case.batch, case.tokens_k, case.kv_heads, head_dim)
    key, value = torch.randn(shape, generator=random).to(dtype).unbind(0)
    key, value = key.to("cuda"), value.to("cuda")
    if case.rule is None:
        ops.forward(query, key, value, None, None, None, None, None, 0.125, case.causal, "running_max")
        return
    size = (case.batch, case.heads, ceil_div(case.tokens_q, TILE_Q), ceil_div(case.tokens_k, BLOCK_K))
    mask = pack_bits(torch.rand(size, generator=random) < 0.7).to("cuda")
    lse_state = torch.full((case.batch, case.heads, case.tokens_q), math.inf).to("cuda")
    thresholds = torch.tensor([-3.0, -math.inf][: case.batch]).to("cuda")
    for _ in range(2):
        ops.forward(query, key, value, mask, lse_state, thresholds, None, None, 0.125, case.causal, case.rule)


def run_all(head_dims: list[int]) -> None:
    for head_dim in head_dims:
        for dtype in DTYPES:
            for case in CASES:
                run(case, head_dim, dtype)
                torch.cuda.synchronize()
                print(f"{case.name}, head size {head_dim}, {dtype}: done", flush=True)


def sanitize(tool: str, head_dims: list[int], timeout: float) -> dict[str, Any]:
    """Run the grid under ``tool``; its summary, its exit code and, where it found something, its first words."""
    command = ["compute-sanitizer", "--tool", tool, "--target-processes", "all", "--error-exitcode", "9"]
    command += ["--print-limit", "20", sys.executable, "-m", "benchmarks.sanitize_forward", "--once"]
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
    return {
        "tool": tool,
        "exit_code": code,
        "summary": summary[-1] if summary else ("timed out" if code == -1 else "no summary"),
        "cases_done": output.count(": done"),
        "cases": len(head_dims) * len(DTYPES) * len(CASES),
        "seconds": round(time.monotonic() - start, 1),
        "found": output[-4000:] if code else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--once", action="store_true", help="run the grid a single time, without a tool")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--head-dims", type=int, nargs="+", default=list(HEAD_DIMS))
    parser.add_argument("--timeout", type=float, default=300, help="seconds for each tool")
    parser.add_argument("--out", type=Path, default=DIRECTORY, help="folder for forward_sanitizer.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("sanitize_forward: expected a CUDA device, found none")
    if args.once:
        run_all(args.head_dims)
        return
    if shutil.which("compute-sanitizer") is None:
        raise SystemExit("sanitize_forward: expected compute-sanitizer on PATH (it comes with the CUDA toolkit)")

    rows = [sanitize(tool, args.head_dims, args.timeout) for tool in args.tools]
    write_result("forward_sanitizer", {"head_dims": args.head_dims, "cases": [c.name for c in CASES]}, rows, args.out)
    for r in rows:
        if r["found"]:
            print(r["found"])
    for r in rows:
        print(f"{r['tool']}: {r['summary']} ({r['cases_done']} of {r['cases']} cases, {r['seconds']} s)")
    if any(r["exit_code"] for r in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
