"""The operators as PyTorch sees them: schemas, argument checks, CPU, CUDA and fake implementations."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from lite_attention import decode_cuda, forward_cpu, forward_cuda, reference
from lite_attention.native import cpu as kernels
from lite_attention.options import check_rule, needs_lse
from lite_attention.tiles import BLOCK_K, DECODE_BLOCK, TILE_Q, ceil_div, mask_words, summary_bytes

FORWARD_SCHEMA = (
    "forward(Tensor query, Tensor key, Tensor value, Tensor(a!)? mask, Tensor(b!)? lse_state, "
    "Tensor? thresholds, Tensor? must_visit, Tensor? must_skip, float scale, bool causal, str rule, *, "
    "Tensor(c!)? pairs_visited=None) -> (Tensor out, Tensor lse)"
)

SUMMARIZE_SCHEMA = "summarize(Tensor key_cache, Tensor slot_mapping, Tensor(a!) summaries) -> ()"

DECODE_SCHEMA = (
    "decode(Tensor query, Tensor key_cache, Tensor value_cache, Tensor summaries, Tensor block_table, "
    "Tensor seq_lens, Tensor slots, Tensor thresholds, Tensor visit_all, Tensor(a!) mask, "
    "float scale) -> (Tensor out, Tensor lse, Tensor visited)"
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

library = torch.library.Library("lite_attention", "DEF")
for schema in (FORWARD_SCHEMA, SUMMARIZE_SCHEMA, DECODE_SCHEMA):
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def unimplemented(operator: str, device_type: str) -> str | None:
    """None, or that ``lite_attention::operator`` has no implementation for any tensor on such devices."""
    dispatch_key = torch._C._dispatch_key_for_device(device_type)
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"lite_attention::{operator}", dispatch_key):
        return None
    return f"lite_attention::{operator} has no implementation for {device_type}"


def unsupported(operator: str, query: Tensor) -> str | None:
    """None, or why ``lite_attention::operator`` cannot run for a query of this device, type and shape.

    Of the query's shape only the last dimension, head_dim, counts. Kernels that are not loaded yet are loaded.
    """
    if reason := unimplemented(operator, query.device.type):
        return reason
    if query.is_cuda:
        try:
            forward_cuda.check_supported(query)
        except (TypeError, ValueError, RuntimeError) as error:
            return str(error)
    return None


def check_inputs(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Check what `lite_attention.reference.forward` says of its first three arguments.

    Raises:
        TypeError: a type is not supported or differs from the query's.
        ValueError: a shape or device does not fit.
    """
    if query.dtype not in DTYPES:
        raise TypeError(f"query: expected float32, bfloat16 or float16, got {query.dtype}")
    if query.dim() != 4:
        raise ValueError(f"query: expected (batch, tokens, heads, head_dim), got shape {tuple(query.shape)}")
    batch, _, heads, head_dim = query.shape
    if key.dim() != 4 or (key.shape[0], key.shape[3]) != (batch, head_dim):
        raise ValueError(f"key: expected ({batch}, tokens, kv_heads, {head_dim}), got shape {tuple(key.shape)}")
    if key.shape[2] == 0 or heads % key.shape[2]:
        raise ValueError(f"key: expected kv_heads that divide {heads} heads, got {key.shape[2]}")
    _check("key", key, key.shape, query.dtype, query.device)
    _check("value", value, key.shape, query.dtype, query.device)


def check_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    lse_state: Tensor | None,
    thresholds: Tensor | None,
    must_visit: Tensor | None,
    must_skip: Tensor | None,
    causal: bool,
    rule: str,
    pairs_visited: Tensor | None = None,
) -> None:
    """Check the arguments of `lite_attention.reference.forward`.

    Raises:
        TypeError: a type is not what is expected.
        ValueError: a shape, device or the rule is not, or an argument is missing or of no use.
    """
    check_inputs(query, key, value)
    checked_rule = check_rule(rule)
    if causal and checked_rule == "mass_summaries":
        raise ValueError("causal: expected False with rule 'mass_summaries', got True")
    state = {
        "lse_state": lse_state,
        "thresholds": thresholds,
        "must_visit": must_visit,
        "must_skip": must_skip,
        "pairs_visited": pairs_visited,
    }
    if mask is None:
        for name, tensor in state.items():
            if tensor is not None:
                raise ValueError(f"{name}: expected None without a mask, got a tensor")
        return
    if thresholds is None:
        raise ValueError("thresholds: expected a tensor beside a mask, got None")
    if needs_lse(checked_rule) and lse_state is None:
        raise ValueError(f"lse_state: expected a tensor with rule {rule!r}, got None")
    batch, tokens_q, heads, _ = query.shape
    words = mask_words(ceil_div(key.shape[1], BLOCK_K))
    _check("mask", mask, (batch, heads, ceil_div(tokens_q, TILE_Q), words), torch.int32, query.device)
    _check("thresholds", thresholds, (batch,), torch.float32, query.device)
    if lse_state is not None:
        _check("lse_state", lse_state, (batch, heads, tokens_q), torch.float32, query.device)
    if must_visit is not None:
        _check("must_visit", must_visit, (words,), torch.int32, query.device)
    if must_skip is not None:
        _check("must_skip", must_skip, (words,), torch.int32, query.device)
    if pairs_visited is not None:
        _check("pairs_visited", pairs_visited, (), torch.int64, query.device)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    lse_state: Tensor | None,
    thresholds: Tensor | None,
    must_visit: Tensor | None,
    must_skip: Tensor | None,
    scale: float,
    causal: bool,
    rule: str,
    *,
    pairs_visited: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Call ``lite_attention::forward``; arguments, results and meaning as `lite_attention.reference.forward`.

    Raises:
        TypeError, ValueError: as `check_forward` says.
        TypeError, ValueError, RuntimeError: on CUDA, as `lite_attention.forward_cuda.forward` says.
    """
    return cast(
        tuple[Tensor, Tensor],
        torch.ops.lite_attention.forward(
            query,
            key,
            value,
            mask,
            lse_state,
            thresholds,
            must_visit,
            must_skip,
            scale,
            causal,
            rule,
            pairs_visited=pairs_visited,
        ),
    )


def visited_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    thresholds: Tensor,
    must_visit: Tensor | None,
    must_skip: Tensor | None,
    scale: float,
) -> Tensor:
    """Log-sum-exp of the scores that a step from ``mask`` visits, without estimates; ``mask`` stays as it is.

    Arguments and result as `lite_attention.reference.forward`.
    """
    step = (mask.clone(), None, thresholds, must_visit, must_skip)
    return forward(query, key, value, *step, scale, False, "running_max")[1]


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {tensor.device}")


def _checked(implementation: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """An implementation of ``forward`` behind the checks that are the same for all."""

    def forward(*arguments: Any, pairs_visited: Tensor | None = None) -> tuple[Tensor, Tensor]:
        *checked, _scale, causal, rule = arguments
        check_forward(*(*checked, causal, rule, pairs_visited))
        return implementation(*arguments, pairs_visited=pairs_visited)

    return forward


def _forward_fake(query: Tensor, *_: object, pairs_visited: Tensor | None = None) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _head_dim = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    return out, torch.empty((batch, heads, tokens), dtype=torch.float32, device=query.device)


library.impl("forward", _checked(forward_cpu.forward), "CPU")
library.impl("forward", _checked(forward_cuda.forward), "CUDA")
torch.library.register_fake("lite_attention::forward", _checked(_forward_fake), lib=library)


def summaries_shape(key_cache: Tensor) -> tuple[int, int, int, int]:
    """Shape of the summaries (uint8) of a paged cache (pages, page_size, kv_heads, head_dim)."""
    pages, page_size, kv_heads, head_dim = key_cache.shape
    return pages, kv_heads, page_size // DECODE_BLOCK, summary_bytes(head_dim)


def check_cache(key_cache: Tensor, summaries: Tensor) -> None:
    """Check the arguments that `lite_attention.reference.summarize` and `decode` share.

    Raises:
        TypeError: a type is not what is expected.
        ValueError: a shape or device is not.
    """
    if key_cache.dtype not in DTYPES:
        raise TypeError(f"key_cache: expected float32, bfloat16 or float16, got {key_cache.dtype}")
    if key_cache.dim() != 4 or key_cache.shape[1] % DECODE_BLOCK:
        raise ValueError(
            f"key_cache: expected (pages, a multiple of {DECODE_BLOCK}, kv_heads, head_dim), "
            f"got shape {tuple(key_cache.shape)}"
        )
    _check("summaries", summaries, summaries_shape(key_cache), torch.uint8, key_cache.device)
    if summaries.stride(3) != 1:
        raise ValueError("summaries: expected a contiguous last dimension")


def check_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    summaries: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    slots: Tensor,
    thresholds: Tensor,
    visit_all: Tensor,
    mask: Tensor,
) -> None:
    """Check the arguments of `lite_attention.reference.decode`.

    Raises:
        TypeError: a type is not what is expected.
        ValueError: a shape or device is not.
    """
    check_cache(key_cache, summaries)
    device = key_cache.device
    if query.dim() != 3:
        raise ValueError(f"query: expected (rows, heads, head_dim), got shape {tuple(query.shape)}")
    rows, heads, _ = query.shape
    kv_heads, head_dim = key_cache.shape[2:]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"query: expected a multiple of {kv_heads} heads, got {heads}")
    _check("query", query, (rows, heads, head_dim), key_cache.dtype, device)
    _check("value_cache", value_cache, key_cache.shape, key_cache.dtype, device)
    if block_table.dim() != 2 or block_table.stride(1) != 1:
        raise ValueError(f"block_table: expected contiguous (rows, pages), got {tuple(block_table.shape)}")
    _check("block_table", block_table, (rows, block_table.shape[1]), torch.int32, device)
    for name, tensor, dtype in (
        ("seq_lens", seq_lens, torch.int32),
        ("slots", slots, torch.int32),
        ("thresholds", thresholds, torch.float32),
        ("visit_all", visit_all, torch.bool),
    ):
        _check(name, tensor, (rows,), dtype, device)
    words = mask_words(block_table.shape[1] * key_cache.shape[1] // DECODE_BLOCK)
    if mask.dim() != 3 or mask.shape[1] != kv_heads or mask.shape[2] < words or mask.stride(2) != 1:
        raise ValueError(f"mask: expected (slots, {kv_heads}, at least {words}), got shape {tuple(mask.shape)}")
    _check("mask", mask, mask.shape, torch.int32, device)


def _checked_summarize(implementation: Callable[..., None]) -> Callable[..., None]:
    def summarize(key_cache: Tensor, slot_mapping: Tensor, summaries: Tensor) -> None:
        check_cache(key_cache, summaries)
        _check("slot_mapping", slot_mapping, (slot_mapping.numel(),), torch.int64, key_cache.device)
        implementation(key_cache, slot_mapping, summaries)

    return summarize


def _checked_decode(
    implementation: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def decode(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *checked, _scale = arguments
        check_decode(*checked)
        return implementation(*arguments)

    return decode


def _summarize_cpu(key_cache: Tensor, slot_mapping: Tensor, summaries: Tensor) -> None:
    implementation = kernels if kernels.supports_keys(key_cache) else reference
    implementation.summarize(key_cache, slot_mapping, summaries)


def _decode_cpu(query: Tensor, key_cache: Tensor, value_cache: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    compiled = kernels.supports_keys(key_cache) and kernels.supports_values(value_cache)
    implementation = kernels if compiled else reference
    return implementation.decode(query, key_cache, value_cache, *rest)


def _summarize_fake(key_cache: Tensor, slot_mapping: Tensor, summaries: Tensor) -> None:
    return None


def _decode_fake(query: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    rows, heads, _head_dim = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty((rows, heads), dtype=torch.float32, device=query.device)
    return out, lse, torch.empty((rows,), dtype=torch.int32, device=query.device)


library.impl("summarize", _checked_summarize(_summarize_cpu), "CPU")
library.impl("summarize", _checked_summarize(decode_cuda.summarize), "CUDA")
torch.library.register_fake("lite_attention::summarize", _summarize_fake, lib=library)
library.impl("decode", _checked_decode(_decode_cpu), "CPU")
library.impl("decode", _checked_decode(decode_cuda.decode), "CUDA")
torch.library.register_fake("lite_attention::decode", _decode_fake, lib=library)
