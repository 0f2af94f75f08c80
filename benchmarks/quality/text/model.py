"""SmolLM2 decoding through `lite_attention::decode`: dense over the prompt, skipping behind it.

The model computes in float32; its cache is in float32 on a CPU, and on a GPU in bfloat16, which the kernels there take.
"""

from __future__ import annotations

import copy
import inspect
import math
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lite_attention import ops
from lite_attention.tiles import DECODE_BLOCK, ceil_div, mask_words, summary_bytes

NAME = "SmolLM2-135M-Instruct"
CACHE_BYTES = 2  # of a number in the cache that the share read is reckoned for
CACHE_DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
PAGE = 128
DEFAULT_MODEL = str(
    Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "lite-attention/smollm2-135m-instruct"
)
PROSE = "prose"


class PagedLayer:
    """One layer's paged cache and skip state, for one sequence."""

    def __init__(self, key: Tensor, value: Tensor, capacity: int) -> None:
        _, kv_heads, _tokens, head_dim = key.shape
        pages = ceil_div(capacity, PAGE)
        dtype, device = CACHE_DTYPES[key.device.type], key.device
        self.key, self.value = torch.zeros(2, pages, PAGE, kv_heads, head_dim, dtype=dtype, device=device).unbind(0)
        self.summaries = torch.zeros(ops.summaries_shape(self.key), dtype=torch.uint8, device=device)
        words = mask_words(pages * PAGE // DECODE_BLOCK)
        self.mask = torch.zeros(1, kv_heads, words, dtype=torch.int32, device=device)
        self.table = torch.arange(pages, dtype=torch.int32, device=device)[None]
        self.write(key[0], value[0], 0)

    def write(self, key: Tensor, value: Tensor, start: int) -> None:
        end = start + key.shape[1]
        self.key.flatten(0, 1)[start:end] = key.transpose(0, 1)
        self.value.flatten(0, 1)[start:end] = value.transpose(0, 1)
        slots = torch.arange(start, end, device=self.key.device)
        torch.ops.lite_attention.summarize(self.key, slots, self.summaries)


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
        self.visited: Tensor | int = 0
        self.total = 0

    def before_step(self, layer_number: int, query: Tensor, tokens: int, scale: float, visit_all: bool) -> None:
        """Called before each step of a layer, with the query (1, heads, head_dim)."""

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if query.shape[2] > 1:
            return self.dense(module, query, key, value, *args, **kwargs)
        tokens = key.shape[2]
        layer = self.layers.get(module.layer_idx)
        if layer is None:
            layer = self.layers[module.layer_idx] = PagedLayer(key, value, self.capacity)
        else:
            layer.write(key[0, :, -1:], value[0, :, -1:], tokens - 1)
        step = self.steps.get(module.layer_idx, 0)
        self.steps[module.layer_idx] = step + 1
        visit_all = step == 0 or (self.refresh_interval > 0 and step % self.refresh_interval == 0)
        self.before_step(module.layer_idx, query[:, :, 0], tokens, module.scaling, visit_all)
        device = query.device
        out, _, visited = torch.ops.lite_attention.decode(
            query[:, :, 0].to(layer.key.dtype),
            layer.key,
            layer.value,
            layer.summaries,
            layer.table,
            torch.tensor([tokens], dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
            torch.tensor([self.threshold], device=device),
            torch.tensor([visit_all], device=device),
            layer.mask,
            module.scaling,
        )
        self.visited += visited.sum()
        self.total += key.shape[1] * ceil_div(tokens, DECODE_BLOCK)
        return out[:, None].to(query.dtype), None


def load(
    folder: str, capacity: int, make: Callable[[Callable[..., Any], int], SkippingDecode] = SkippingDecode
) -> tuple[Any, Any, SkippingDecode]:
    """Model in float32, on the GPU if there is one, tokenizer, and the attention put into the model.

    Args:
        capacity: tokens of a sequence at most.
    """
    torch.set_grad_enabled(False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    attention = make(ALL_ATTENTION_FUNCTIONS["sdpa"], capacity)
    ALL_ATTENTION_FUNCTIONS.register("lite_attention", attention)
    model.config._attn_implementation = "lite_attention"
    return model, AutoTokenizer.from_pretrained(folder), attention


def read_text(tokenizer: Any, name: str, tokens: int) -> Tensor:
    """The first tokens (int64) of a text: a module of Python's standard library, or the prose of its manual.

    Raises:
        SystemExit: the text is shorter.
    """
    text = "\n\n".join(topics.topics.values()) if name == PROSE else inspect.getsource(import_module(name))
    ids: Tensor = tokenizer(text[: 8 * tokens], return_tensors="pt").input_ids[0]
    if len(ids) < tokens:
        raise SystemExit(f"texts: expected modules of at least {tokens} tokens, {name} has {len(ids)}")
    return ids[:tokens]


def prefill(model: Any, tokens: Tensor) -> DynamicCache:
    """The cache of a prompt (tokens,)."""
    cache = DynamicCache()
    model(tokens[None].to(model.device), past_key_values=cache, logits_to_keep=1)
    return cache


def decode(model: Any, prompt_cache: DynamicCache, tokens: Tensor, more: int = 0) -> tuple[Tensor, list[int]]:
    """Teacher-forced steps behind a prompt, and `more` greedy ones behind these.

    Returns:
        Log-probabilities (steps, vocabulary) of the forced steps, and the greedy tokens.
    """
    cache = copy.deepcopy(prompt_cache)
    start = cache.get_seq_length()
    rows: list[Tensor] = []
    given = tokens.tolist()
    for i in range(len(tokens) + more):
        token = given[i] if i < len(given) else int(rows[-1].argmax())
        position = torch.tensor([start + i], device=model.device)
        step = torch.tensor([[token]], device=model.device)
        logits = model(step, past_key_values=cache, cache_position=position).logits[0, -1]
        rows.append(logits.log_softmax(-1).cpu())
    greedy = [int(row.argmax()) for row in rows[len(given) - 1 :]]
    return torch.stack(rows[: len(given)]), greedy


def share_read(model: Any, attention: SkippingDecode) -> float:
    """Share of the KV cache that was read since `restart`: visited blocks and the summaries of all."""
    head_dim = model.config.head_dim
    summary = summary_bytes(head_dim) / (2 * head_dim * DECODE_BLOCK * CACHE_BYTES)
    return int(attention.visited) / attention.total + summary
