"""The picture in the README: which blocks decode steps of a real model read.

python benchmarks/plot_skipping.py --output docs/skipping.png
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap
from torch import Tensor

from benchmarks.quality.text.model import DEFAULT_MODEL, SkippingDecode, decode, load, prefill, read_text
from lite_attention import reference
from lite_attention.ranges import unpack_bits
from lite_attention.tiles import DECODE_BLOCK, ceil_div


class Recorder(SkippingDecode):
    """Notes which blocks each KV head is about to visit."""

    def __init__(self, dense: Callable[..., Any], capacity: int) -> None:
        super().__init__(dense, capacity)
        self.visits: defaultdict[tuple[int, int], list[Tensor]] = defaultdict(list)

    def before_step(self, layer_number: int, query: Tensor, tokens: int, scale: float, visit_all: bool) -> None:
        layer = self.layers[layer_number]
        blocks = ceil_div(tokens, DECODE_BLOCK)
        kv_heads = layer.key.shape[2]
        summaries = layer.summaries.transpose(1, 2).flatten(0, 1)[:blocks]
        always = torch.cat((torch.arange(DECODE_BLOCK), torch.arange((blocks - 2) * DECODE_BLOCK, tokens)))
        keys = layer.key.flatten(0, 1)[always]
        for head, q in enumerate(query[0].view(kv_heads, -1, query.shape[2])):
            visit = torch.ones(blocks, dtype=torch.bool)
            if not visit_all:
                scaled = q * scale * reference.LOG2_E
                mass = torch.logsumexp(scaled @ keys[:, head].T / reference.LOG2_E, 1) * reference.LOG2_E
                mattered = unpack_bits(layer.mask[0, head], blocks)
                visit = reference.blocks_to_visit(scaled, summaries[:, head], mattered, mass, self.threshold)
            self.visits[layer_number, head].append(visit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder from `lite-attention model smollm2`")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--threshold", type=float, default=-7.5)
    parser.add_argument("--heads", nargs="+", default=["1.1", "14.0", "27.2"], help="LAYER.KV_HEAD of each panel")
    parser.add_argument("--output", type=Path, default=Path("docs/skipping.png"))
    args = parser.parse_args()

    recorder = None

    def make(dense: Callable[..., Any], capacity: int) -> Recorder:
        nonlocal recorder
        recorder = Recorder(dense, capacity)
        return recorder

    model, tokenizer, attention = load(args.model, args.context + args.steps, make)
    tokens = read_text(tokenizer, "argparse", args.context + args.steps)
    prompt_cache = prefill(model, tokens[: args.context])
    attention.restart(args.threshold)
    decode(model, prompt_cache, tokens[args.context :])
    assert recorder is not None

    figure, panels = plt.subplots(1, len(args.heads), figsize=(11, 3.2), sharey=True, layout="constrained")
    for panel, name in zip(panels, args.heads, strict=True):
        layer, head = map(int, name.split("."))
        rows = recorder.visits[layer, head]
        picture = torch.full((len(rows), max(len(row) for row in rows)), math.nan)
        for row, visit in zip(picture, rows, strict=True):
            row[: len(visit)] = visit.float()
        read = torch.nanmean(picture[1:]).item()
        panel.imshow(picture, aspect="auto", interpolation="nearest", cmap=ListedColormap(["#e8ecf1", "#1f4e8c"]))
        panel.set_title(f"layer {layer}, KV head {head}: {read:.0%} of blocks read", fontsize=10)
        panel.set_xlabel(f"block of {DECODE_BLOCK} keys")
    panels[0].set_ylabel("decode step")
    figure.suptitle(f"SmolLM2-135M, {args.context} tokens of source code, threshold {args.threshold:g}", fontsize=11)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=110)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
