"""How far `lite_attention::forward` and FlashAttention 3 are from float64, on easy and on hard inputs.

Everything is computed on one device, the float64 attention too, head by head. For each kind of input: the norm of the
error over the norm of the output, the largest error of an element, and the largest error of the log-sum-exp.
"rounding" is the float64 output rounded once, the least that any kernel can do.

Kinds of input:
    normal      standard normal queries, keys and values
    sharp       scores of several hundred: each query attends one key or two
    outliers    four channels of queries and keys are 30 times as large
    constant    all keys are equal: uniform weights
    dominant    one key takes most of the weight of every query
    offset      values with a mean of 50
    skipping    normal, and half of the blocks skipped at random

Examples:
    python -m benchmarks.forward_error
    python -m benchmarks.forward_error --device cpu --tokens 512 --only normal sharp
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.forward_time import NEVER, flash_attention_3
from benchmarks.results import DIRECTORY, write_result
from lite_attention import ops
from lite_attention.ranges import pack_bits
from lite_attention.tiles import BLOCK_K, TILE_Q, ceil_div

KINDS = ("normal", "sharp", "outliers", "constant", "dominant", "offset", "skipping")
Inputs = tuple[Tensor, Tensor, Tensor]
Result = tuple[Tensor, Tensor]


def make_inputs(kind: str, tokens: int, heads: int, head_dim: int, dtype: torch.dtype, device: str) -> Inputs:
    random = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, tokens, heads, head_dim, generator=random)
    if kind == "sharp":
        query, key = 12 * query, 12 * key
    elif kind == "outliers":
        query[..., :4] *= 30
        key[..., :4] *= 30
    elif kind == "constant":
        key = key[:, :1].expand_as(key)
    elif kind == "dominant":
        query = query + 1
        key[:, tokens // 3] = (math.log(tokens) + 3) / head_dim**0.5
    elif kind == "offset":
        value = value + 50
    return query.to(device, dtype), key.to(device, dtype), value.to(device, dtype)


def random_bits(tokens: int, heads: int, device: str) -> Tensor:
    """Blocks to visit, bool (1, heads, tiles, blocks): about half, never none."""
    random = torch.Generator().manual_seed(1)
    bits = torch.rand(1, heads, ceil_div(tokens, TILE_Q), ceil_div(tokens, BLOCK_K), generator=random) < 0.5
    bits[..., -1] = True
    return bits.to(device)


def exact(query: Tensor, key: Tensor, value: Tensor, bits: Tensor | None) -> Result:
    """Attention in float64, (1, tokens, heads, head_dim) and (1, heads, tokens)."""
    tokens = query.shape[1]
    outs, lses = [], []
    for head in range(query.shape[2]):
        q, k, v = (tensor[0, :, head].double() for tensor in (query, key, value))
        scores = (q @ k.T) * query.shape[3] ** -0.5
        if bits is not None:
            visited = bits[0, head].repeat_interleave(TILE_Q, 0).repeat_interleave(BLOCK_K, 1)
            scores.masked_fill_(~visited[:tokens, :tokens], -math.inf)
        lses.append(scores.logsumexp(-1))
        outs.append(scores.softmax(-1) @ v)
    return torch.stack(outs, 1)[None], torch.stack(lses)[None]


def ours(query: Tensor, key: Tensor, value: Tensor, bits: Tensor | None) -> Result:
    mask = None if bits is None else pack_bits(bits)
    thresholds = None if bits is None else torch.full((1,), NEVER, device=query.device)
    scale = query.shape[3] ** -0.5
    return ops.forward(query, key, value, mask, None, thresholds, None, None, scale, False, "running_max")


def errors(result: Result, expected: Result) -> dict[str, float]:
    out, lse = (got.double() - wanted for got, wanted in zip(result, expected, strict=True))
    return {
        "relative": float(out.norm() / expected[0].norm()),
        "largest": float(out.abs().max()),
        "lse": float(lse.abs().max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS, metavar="KIND", help="kinds of input")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--device", default="cuda", help="cpu compares the CPU implementation")
    parser.add_argument("--out", type=Path, default=DIRECTORY, help="folder for forward_error.json")
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("forward_error: expected a CUDA device, found none (--device cpu works anywhere)")

    dtype = getattr(torch, args.dtype)
    fa3 = flash_attention_3() if args.device != "cpu" and dtype == torch.bfloat16 else None
    rows: list[dict[str, Any]] = []
    for kind in tqdm(args.only, unit="kind"):
        for head_dim in args.head_dims:
            inputs = make_inputs(kind, args.tokens, args.heads, head_dim, dtype, args.device)
            bits = random_bits(args.tokens, args.heads, args.device) if kind == "skipping" else None
            expected = exact(*inputs, bits)
            results = {"ours": ours(*inputs, bits), "rounding": (expected[0].to(dtype), expected[1].float())}
            if fa3 is not None and bits is None:
                results["fa3"] = fa3(*inputs, return_attn_probs=True)
            common = {"kind": kind, "head_dim": head_dim}
            rows += [common | {"kernel": name, **errors(result, expected)} for name, result in results.items()]

    setup = {"tokens": args.tokens, "heads": args.heads, "dtype": args.dtype, "reference": f"float64 on {args.device}"}
    write_result("forward_error", setup, rows, args.out)
    print("| input | head dim | kernel | relative error | largest error | largest error of LSE |")
    print("|---" * 6 + "|")
    for r in rows:
        figures = f"{r['relative']:.2e} | {r['largest']:.2e} | {r['lse']:.2e}"
        print(f"| {r['kind']} | {r['head_dim']} | {r['kernel']} | {figures} |")


if __name__ == "__main__":
    main()
