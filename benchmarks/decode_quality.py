"""What skipping costs in quality: SmolLM2 over real source code, teacher forced, against dense decoding.

For each threshold the model decodes the same 128 tokens behind 4,096 tokens of Python's own standard library, once
dense and once skipping, through `lite_attention::decode`. Reported are the share of the KV cache that was read
(visited blocks plus the summaries of all blocks, as in a bfloat16 cache), the mean KL divergence of the next-token
distributions to the dense ones, and how often the most likely token is the same.

    python benchmarks/decode_quality.py --model ~/.cache/lite-attention/smollm2-135m-instruct
"""

from __future__ import annotations

import argparse
import copy
import inspect
import math
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.results import write_result
from lite_attention import ops
from lite_attention.tiles import DECODE_BLOCK, ceil_div, mask_words

TEXTS = ("argparse", "dataclasses", "typing", "inspect")
CACHE_BYTES = 2  # of a number in the cache that the share read is reckoned for
PAGE = 128
DEFAULT_MODEL = str(
    Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "lite-attention/smollm2-135m-instruct"
)


class PagedLayer:
    """One layer's paged cache and skip state, for one sequence."""

    def __init__(self, key: Tensor, value: Tensor, heads: int, capacity: int) -> None:
        _, kv_heads, _tokens, head_dim = key.shape
        pages = ceil_div(capacity, PAGE)
        self.key, self.value = torch.zeros(2, pages, PAGE, kv_heads, head_dim, dtype=key.dtype).unbind(0)
        self.summaries = torch.zeros(ops.summaries_shape(self.key), dtype=torch.uint8)
        self.mask = torch.zeros(1, kv_heads, mask_words(pages * PAGE // DECODE_BLOCK), dtype=torch.int32)
        self.lse = torch.zeros(1, heads)
        self.table = torch.arange(pages, dtype=torch.int32)[None]
        self.write(key[0], value[0], 0)

    def write(self, key: Tensor, value: Tensor, start: int) -> None:
        end = start + key.shape[1]
        self.key.flatten(0, 1)[start:end] = key.transpose(0, 1)
        self.value.flatten(0, 1)[start:end] = value.transpose(0, 1)
        torch.ops.lite_attention.summarize(self.key, torch.arange(start, end), self.summaries)


class SkippingDecode:
    """Attention of a Hugging Face model: dense over the prompt, `lite_attention::decode` behind it."""

    def __init__(self, dense: Callable[..., Any], capacity: int) -> None:
        self.dense = dense
        self.capacity = capacity
        self.restart(-math.inf)

    def restart(self, threshold: float, refresh_interval: int = 0) -> None:
        self.threshold, self.refresh_interval = float(threshold), refresh_interval
        self.layers: dict[int, PagedLayer] = {}
        self.steps: dict[int, int] = {}
        self.visited = self.total = 0

    def before_step(self, layer_number: int, query: Tensor, tokens: int, scale: float, visit_all: bool) -> None:
        """Called before each step of a layer, with the query (1, heads, head_dim)."""

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if query.shape[2] > 1:
            return self.dense(module, query, key, value, *args, **kwargs)  # type: ignore[no-any-return]
        tokens, heads = key.shape[2], query.shape[1]
        layer = self.layers.get(module.layer_idx)
        if layer is None:
            layer = self.layers[module.layer_idx] = PagedLayer(key, value, heads, self.capacity)
        else:
            layer.write(key[0, :, -1:], value[0, :, -1:], tokens - 1)
        step = self.steps.get(module.layer_idx, 0)
        self.steps[module.layer_idx] = step + 1
        visit_all = step == 0 or (self.refresh_interval > 0 and step % self.refresh_interval == 0)
        self.before_step(module.layer_idx, query[:, :, 0], tokens, module.scaling, visit_all)
        out, _, visited = torch.ops.lite_attention.decode(
            query[:, :, 0],
            layer.key,
            layer.value,
            layer.summaries,
            layer.table,
            torch.tensor([tokens], dtype=torch.int32),
            torch.zeros(1, dtype=torch.int32),
            torch.tensor([self.threshold]),
            torch.tensor([visit_all]),
            layer.mask,
            layer.lse,
            module.scaling,
        )
        self.visited += int(visited)
        self.total += key.shape[1] * ceil_div(tokens, DECODE_BLOCK)
        return out[:, None], None


def load(
    folder: str, capacity: int, make: Callable[[Callable[..., Any], int], SkippingDecode] = SkippingDecode
) -> tuple[Any, Any, SkippingDecode]:
    """Model in float32, tokenizer, and the attention put into the model."""
    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    attention = make(ALL_ATTENTION_FUNCTIONS["sdpa"], capacity)
    ALL_ATTENTION_FUNCTIONS.register("lite_attention", attention)
    model.config._attn_implementation = "lite_attention"
    return model, AutoTokenizer.from_pretrained(folder), attention


def prefill(model: Any, tokenizer: Any, text: str, context: int, steps: int) -> tuple[DynamicCache, Tensor]:
    """Cache of the first `context` tokens of a module's source, and the `steps` tokens behind them."""
    tokens = tokenizer(inspect.getsource(import_module(text)), return_tensors="pt").input_ids[0]
    if len(tokens) < context + steps:
        raise SystemExit(f"--texts: expected modules of {context + steps} tokens, {text} has {len(tokens)}")
    cache = DynamicCache()
    model(tokens[None, :context], past_key_values=cache, logits_to_keep=1)
    return cache, tokens[context : context + steps]


def decode(model: Any, attention: SkippingDecode, prompt_cache: DynamicCache, tokens: Tensor) -> Tensor:
    """Logits (steps, vocabulary) of teacher-forced steps behind a prompt."""
    cache = copy.deepcopy(prompt_cache)
    start = cache.get_seq_length()
    logits = [
        model(token[None, None], past_key_values=cache, cache_position=torch.tensor([start + i])).logits[0, -1]
        for i, token in enumerate(tokens)
    ]
    return torch.stack(logits).log_softmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder from `lite-attention model smollm2`")
    parser.add_argument("--context", type=int, default=4096, help="tokens before the first step")
    parser.add_argument("--steps", type=int, default=128, help="teacher-forced steps a text")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[-4, -5, -6, -7, -8, -9, -10])
    parser.add_argument("--refresh-intervals", type=int, nargs="+", default=[0], help="0 is never")
    parser.add_argument("--texts", nargs="+", default=list(TEXTS), help="modules of the standard library")
    args = parser.parse_args()

    model, tokenizer, attention = load(args.model, args.context + args.steps)
    settings = [(t, r) for r in args.refresh_intervals for t in args.thresholds]
    sums = {setting: [0.0, 0, 0, 0] for setting in settings}
    progress = tqdm(total=len(args.texts) * (len(settings) + 1), unit="run")
    for text in args.texts:
        attention.restart(-math.inf)
        prompt_cache, forced = prefill(model, tokenizer, text, args.context, args.steps)
        dense = decode(model, attention, prompt_cache, forced)
        progress.update()
        for setting in settings:
            attention.restart(*setting)
            skipping = decode(model, attention, prompt_cache, forced)
            total = sums[setting]
            total[0] += (dense.exp() * (dense - skipping)).sum(-1).sum().item()
            total[1] += int((dense.argmax(-1) == skipping.argmax(-1)).sum())
            total[2] += attention.visited
            total[3] += attention.total
            progress.update()
    progress.close()

    steps = len(args.texts) * args.steps
    head_dim = model.config.head_dim
    summary_share = (2 * head_dim + 8) / (2 * head_dim * DECODE_BLOCK * CACHE_BYTES)
    rows = [
        {
            "threshold": threshold,
            "refresh_interval": refresh,
            "read": visited / total + summary_share,
            "kl": kl / steps,
            "top1": same / steps,
        }
        for (threshold, refresh), (kl, same, visited, total) in sums.items()
    ]
    print("| threshold | refresh | KV read | mean KL | top-1 |\n|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['threshold']:g} | {row['refresh_interval'] or 'never'} | {row['read']:.3f} "
            f"| {row['kl']:.4f} | {row['top1']:.3f} |"
        )
    setup = {
        "model": "SmolLM2-135M-Instruct",
        "context": args.context,
        "steps": args.steps,
        "texts": args.texts,
    }
    write_result("decode_quality", setup, rows)


if __name__ == "__main__":
    main()
