"""How decode time falls with the share that is read: `lite_attention::decode` against vLLM's CPU_ATTN kernel.

One sequence over a paged cache in vLLM's own layout, both kernels in one process, calls taken in turns, medians.
Which blocks are read is forced through the mask (a random choice, the same share in each KV head) with estimates
that never pass the threshold, so every share can be had; scoring all blocks is part of the time.

    python benchmarks/decode_time.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from vllm import _custom_ops as vllm_ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from benchmarks.results import write_result
from lite_attention import ops
from lite_attention.ranges import pack_bits
from lite_attention.tiles import DECODE_BLOCK

SHAPES = {"SmolLM2-135M (9 query heads, 3 KV heads of 64)": (9, 3, 64), "Llama-3-8B (32, 8 of 128)": (32, 8, 128)}
NEVER = -60.0  # a threshold that every exact share passes, so that the mask stays as it was forced
PAGE = 128


class Case:
    """One shape: inputs in vLLM's layout, and a call of each kernel."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int, tokens: int) -> None:
        torch.manual_seed(0)
        dtype = torch.bfloat16
        pages = tokens // PAGE
        self.heads, self.kv_heads, self.head_dim, self.tokens = heads, kv_heads, head_dim, tokens
        cache = torch.zeros(pages, kv_heads, 2 * PAGE, head_dim, dtype=dtype)
        self.key, self.value = cache.chunk(2, dim=2)
        keys, values = torch.randn(2, tokens, kv_heads, head_dim, dtype=dtype).unbind(0)
        isa = _get_attn_isa(dtype, PAGE, head_dim)
        self.isa = "vec" if isa == "amx" else isa
        slots = torch.arange(tokens)
        vllm_ops.cpu_attn_reshape_and_cache(keys, values, self.key, self.value, slots, self.isa)
        self.query = torch.randn(1, heads, head_dim, dtype=dtype)
        self.table = torch.arange(pages, dtype=torch.int32)[None]
        self.lengths = torch.tensor([tokens], dtype=torch.int32)
        page, head = self.key.stride()[:2]
        self.keys = self.key.as_strided((pages, PAGE, kv_heads, head_dim), (page, 1, head, PAGE))
        self.summaries = torch.zeros(ops.summaries_shape(self.keys), dtype=torch.uint8)
        torch.ops.lite_attention.summarize(self.keys, slots, self.summaries)

    def stock(self) -> Callable[[], Any]:
        out = torch.empty_like(self.query)
        start = torch.tensor([0, 1], dtype=torch.int32)
        common = {"query_start_loc": start, "seq_lens": self.lengths, "causal": True}
        plan = vllm_ops.cpu_attn_get_scheduler_metadata(
            num_reqs=1,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=self.query.dtype,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=True,
            **common,
        )
        return lambda: vllm_ops.cpu_attention_with_kv_cache(
            query=self.query,
            key_cache=self.key,
            value_cache=self.value,
            output=out,
            scale=self.head_dim**-0.5,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=self.table,
            softcap=0,
            scheduler_metadata=plan,
            s_aux=None,
            **common,
        )

    def skipping(self, share: float) -> tuple[Callable[[], Any], float]:
        """A call that reads about `share` of the blocks, and the share that it reads."""
        blocks = self.tokens // DECODE_BLOCK
        chosen = torch.stack([torch.randperm(blocks) < round(share * blocks) for _ in range(self.kv_heads)])
        mask = torch.stack([pack_bits(head) for head in chosen])[None]
        summaries = torch.full_like(self.summaries, 255)  # scales that are no numbers: no estimate passes
        threshold = torch.tensor([-float("inf") if share == 1 else NEVER])
        arguments: tuple[Any, ...] = (
            self.query,
            self.keys,
            self.value.transpose(1, 2),
            summaries,
            self.table,
            self.lengths,
            torch.zeros(1, dtype=torch.int32),
            threshold,
            torch.tensor([False]),
            mask,
            self.head_dim**-0.5,
        )

        def call() -> Tensor:
            return torch.ops.lite_attention.decode(*arguments)[2]  # type: ignore[no-any-return]

        return call, int(call()) / (blocks * self.kv_heads)


def median_times(calls: list[Callable[[], Any]], rounds: int) -> list[float]:
    """Median seconds of each call, taken in turns."""
    times: list[list[float]] = [[] for _ in calls]
    for number in range(rounds + 3):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if number >= 3:
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="context, a multiple of 128")
    parser.add_argument("--shares", type=float, nargs="+", default=[1, 0.5, 0.25, 0.1, 0.05])
    parser.add_argument("--rounds", type=int, default=200)
    args = parser.parse_args()

    rows = []
    for name, shape in tqdm(SHAPES.items(), unit="shape"):
        case = Case(*shape, args.tokens)
        calls, reads = zip(*(case.skipping(share) for share in args.shares), strict=True)
        stock, *times = median_times([case.stock(), *calls], args.rounds)
        rows += [
            {"shape": name, "read": read, "speedup": stock / taken, "microseconds": 1e6 * taken}
            for read, taken in zip(reads, times, strict=True)
        ]
    print("| shape | blocks read | speed against CPU_ATTN |\n|---|---|---|")
    for row in rows:
        print(f"| {row['shape']} | {row['read']:.0%} | {row['speedup']:.2f} x |")
    write_result("decode_time", {"tokens": args.tokens, "dtype": "bfloat16", "rounds": args.rounds}, rows)


if __name__ == "__main__":
    main()
