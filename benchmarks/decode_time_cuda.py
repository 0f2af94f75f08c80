"""How decode time falls with the share that is read: `lite_attention::decode` against vLLM's FlashAttention 3, paged.

Both in one process, on the same cache in vLLM's layout (keys and values of a token side by side), each in a CUDA
graph as engines run it, medians of `triton.testing.do_bench`. Which blocks are read is forced through the mask, with
summaries from which no estimate passes the threshold, so that every share can be had; reading and scoring the
summaries of all blocks is part of the time. The law of the forced lists is in benchmarks/forced_lists.py.

`do_bench` leaves the L2 cache full of zeros that are yet to be written back, and whoever is timed pays for that. In an
engine they are keys, values and weights, which are only read; so each is timed again behind a kernel that reads.

    python -m benchmarks.decode_time_cuda [--out FOLDER]
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from triton.testing import do_bench

from benchmarks.forced_lists import forced_lists, let_no_estimate_pass
from benchmarks.results import DIRECTORY, write_result
from lite_attention import decode_cuda, ops
from lite_attention.ranges import pack_bits
from lite_attention.tiles import DECODE_BLOCK, summary_bytes

SEQUENCES = ((1, 131072), (16, 32768), (64, 8192), (64, 32768))
SHARES = (0.25, 0.10, 0.0)
HEADS, KV_HEADS, HEAD_DIM, PAGE = 32, 8, 128, 16
SUMMARY_BYTES = summary_bytes(HEAD_DIM)
BLOCK_BYTES = 2 * DECODE_BLOCK * HEAD_DIM * 2
SPLITS = 32
CLEAN_REPETITIONS = 100
NEVER = -1000.0
DEVICE = "cuda"


def read_bandwidth() -> float:
    """Bytes a second at which PyTorch reads memory to reduce it."""
    tensor = torch.ones(1 << 30, dtype=torch.float32, device=DEVICE)
    return tensor.nbytes / (1e-3 * do_bench(lambda: torch.amax(tensor), return_mode="median"))


class Case:
    """One batch over one cache, and a call of each kernel on it."""

    def __init__(self, rows: int, tokens: int) -> None:
        torch.manual_seed(0)
        self.rows, self.tokens, self.blocks = rows, tokens, tokens // DECODE_BLOCK
        pages = rows * tokens // PAGE
        cache = torch.empty(pages, PAGE, KV_HEADS, 2 * HEAD_DIM, dtype=torch.bfloat16, device=DEVICE).normal_()
        self.key, self.value = cache.split(HEAD_DIM, -1)
        self.query = torch.randn(rows, HEADS, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE)
        self.table = torch.randperm(pages, device=DEVICE).view(rows, -1).int()
        self.lengths = torch.full((rows,), tokens, dtype=torch.int32, device=DEVICE)
        self.summaries = torch.zeros(ops.summaries_shape(self.key), dtype=torch.uint8, device=DEVICE)
        let_no_estimate_pass(self.summaries)
        self.out = torch.empty_like(self.query)

    def flash(self) -> Callable[[], Any]:
        from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

        starts = torch.arange(self.rows + 1, dtype=torch.int32, device=DEVICE)
        # As vLLM calls it in a graph: at most 32 splits, planned beforehand.
        plan = get_scheduler_metadata(
            batch_size=self.rows,
            max_seqlen_q=1,
            max_seqlen_k=self.tokens,
            num_heads_q=HEADS,
            num_heads_kv=KV_HEADS,
            headdim=HEAD_DIM,
            cache_seqlens=self.lengths,
            qkv_dtype=torch.bfloat16,
            cu_seqlens_q=starts,
            page_size=PAGE,
            causal=True,
            num_splits=SPLITS,
        )
        return lambda: flash_attn_varlen_func(
            q=self.query,
            k=self.key,
            v=self.value,
            out=self.out,
            cu_seqlens_q=starts,
            max_seqlen_q=1,
            seqused_k=self.lengths,
            max_seqlen_k=self.tokens,
            softmax_scale=HEAD_DIM**-0.5,
            causal=True,
            block_table=self.table,
            scheduler_metadata=plan,
            num_splits=SPLITS,
            fa_version=3,
        )

    def lite(self, share: float | None) -> tuple[Callable[[], Any], float]:
        """A call that reads about `share` of the blocks, and the share that it reads. None: every row is disabled."""
        bits = forced_lists(self.rows * KV_HEADS, self.blocks, share or 0.0)
        mask = pack_bits(bits).view(self.rows, KV_HEADS, -1).to(DEVICE)
        threshold = -math.inf if share is None else NEVER
        visited = torch.zeros(self.rows, dtype=torch.int32, device=DEVICE)
        lse = torch.empty(self.rows, HEADS, device=DEVICE)
        size = decode_cuda.workspace_bytes(self.rows, HEADS, KV_HEADS, HEAD_DIM, self.tokens)
        arguments: tuple[Any, ...] = (
            self.out,
            lse,
            visited,
            self.query,
            self.key,
            self.value,
            self.summaries,
            self.table,
            self.lengths,
            torch.arange(self.rows, dtype=torch.int32, device=DEVICE),
            torch.full((self.rows,), threshold, device=DEVICE),
            torch.zeros(self.rows, dtype=torch.bool, device=DEVICE),
            mask,
            HEAD_DIM**-0.5,
            torch.empty(size, dtype=torch.uint8, device=DEVICE),
        )
        decode_cuda.decode_into(*arguments)
        read = float(visited.sum()) / (self.rows * KV_HEADS * self.blocks)
        return lambda: decode_cuda.decode_into(*arguments), read

    def read_bytes(self, share: float, scored: bool) -> float:
        blocks = self.rows * KV_HEADS * self.blocks
        return blocks * (share * BLOCK_BYTES + scored * SUMMARY_BYTES)


def captured(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def median_ms(graph: torch.cuda.CUDAGraph) -> float:
    return float(do_bench(graph.replay, warmup=50, rep=200, return_mode="median"))


def clean_median_ms(graph: torch.cuda.CUDAGraph) -> float:
    """As `median_ms`, with an L2 cache full of what need not be written back."""
    other = torch.ones(1 << 28, dtype=torch.float32, device=DEVICE)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(CLEAN_REPETITIONS)]
    for start, end in events:
        torch.amax(other)
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def measure(rows: int, tokens: int, bandwidth: float, against_flash: bool) -> list[dict[str, Any]]:
    case = Case(rows, tokens)
    flash = flash_clean = None
    if against_flash:
        graph = captured(case.flash())
        flash, flash_clean = median_ms(graph), clean_median_ms(graph)
    results = []
    for share in (None, *SHARES):
        call, read = case.lite(share)
        graph = captured(call)
        taken, clean = median_ms(graph), clean_median_ms(graph)
        at_bandwidth = 1e3 * case.read_bytes(read, share is not None) / bandwidth
        results.append(
            {
                "sequences": rows,
                "tokens": tokens,
                "share": share,
                "read": read,
                "milliseconds": taken,
                "flash_milliseconds": flash,
                "speedup": flash / taken if flash else None,
                "bandwidth": at_bandwidth / taken,
                "clean_milliseconds": clean,
                "clean_flash_milliseconds": flash_clean,
                "clean_bandwidth": at_bandwidth / clean,
            }
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DIRECTORY, help="folder for the result (default: %(default)s)")
    parser.add_argument("--without-flash", action="store_true", help="leave out vLLM, where it is not installed")
    args = parser.parse_args()
    bandwidth = read_bandwidth()
    rows = []
    for sequences, tokens in tqdm(SEQUENCES, unit="batch"):
        rows += measure(sequences, tokens, bandwidth, not args.without_flash)
        torch.cuda.empty_cache()
    print(f"read bandwidth {bandwidth / 1e12:.2f} TB/s")
    for row in rows:
        share = "dense" if row["share"] is None else f"{row['share']:.0%}"
        speedup = f"{row['speedup']:.2f} x FlashAttention 3" if row["speedup"] else ""
        print(
            f"{row['sequences']:3} x {row['tokens']:6} {share:>5} (read {row['read']:.3f}): "
            f"{1e3 * row['milliseconds']:7.1f} us, {row['bandwidth']:.2f} of the bandwidth  {speedup}; "
            f"L2 cache clean: {1e3 * row['clean_milliseconds']:7.1f} us, {row['clean_bandwidth']:.2f}"
        )
    options = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "page_size": PAGE, "bandwidth": bandwidth}
    write_result("decode_time_cuda", options, rows, args.out)


if __name__ == "__main__":
    main()
