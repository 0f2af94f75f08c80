"""`lite_attention::forward` on Hopper GPUs: prepares memory for the kernels of ``csrc/sm90``."""

from typing import get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from lite_attention.native import cuda
from lite_attention.native.cuda import ALIGNMENT, DTYPES, MAX_HEAD_DIM
from lite_attention.options import Rule
from lite_attention.tiles import BLOCK_K, ceil_div


def check_supported(query: Tensor) -> None:
    """Check that the kernels take this query, (batch, tokens, heads, head_dim), on its CUDA device.

    Raises:
        TypeError: it is neither bfloat16 nor float16.
        ValueError: head_dim is not from 1 to 256.
        RuntimeError: the kernels are not built, or not for this GPU.
    """
    if query.dtype not in DTYPES:
        raise TypeError(f"query: expected bfloat16 or float16 on {query.device.type}, got {query.dtype}")
    head_dim = query.shape[3]
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"query: expected head_dim from 1 to {MAX_HEAD_DIM} on {query.device.type}, got {head_dim}")
    if reason := cuda.obstacle(query.device.index):
        raise RuntimeError(f"lite_attention::forward cannot run on {query.device}: {reason}")


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
    rule: Rule,
    *,
    pairs_visited: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments, results and meaning as `lite_attention.reference.forward`; bfloat16 and float16.

    Decisions are those of the reference within rounding (of bfloat16, for ``running_max`` on bfloat16), but for blocks
    more than 100 log2 units below the row's weights, which stay.

    Launches on the current stream and never waits. Allocates the results, with ``mass_summaries`` the summaries and as
    much as the mask, and copies of inputs that the GPU's copy engine cannot read: of those not aligned to 16 bytes or
    with a dimension that is expanded or has a stride of no multiple of 16 bytes, of those with a last dimension that is
    not contiguous, and of those whose head_dim is no multiple of 8, padded with zeros; of the query also where scale is
    not positive. The mask and lse_state are copied to and fro if their last dimension is not contiguous.

    Raises:
        TypeError, ValueError, RuntimeError: as `check_supported` says.
        RuntimeError: the launch fails.
    """
    check_supported(query)
    batch, tokens_q, heads, head_dim = query.shape
    if not scale > 0:
        # The kernels scale maxima, which only a positive factor leaves maxima.
        query, scale = (-query, -scale) if scale < 0 else (query * scale, 1.0)
    query, key, value = (_readable(tensor) for tensor in (query, key, value))
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if pairs_visited is not None and mask is not None and not mask.numel():
        pairs_visited.zero_()  # an empty mask has no address, so the kernels take the call for a dense one
    # One allocation for two: behind the results a counter, and the order and what each row of the mask visits.
    rows = batch * heads * tokens_q
    schedule_words = 1 if mask is None else 1 + 2 * mask.shape[:3].numel()
    words = torch.empty(rows + schedule_words, dtype=torch.float32, device=query.device)
    lse, schedule = words[:rows].view(batch, heads, tokens_q), words[rows:].view(torch.int32)
    mask_rows, lse_rows = _contiguous_rows(mask), _contiguous_rows(lse_state)
    must_visit, must_skip = _contiguous_rows(must_visit), _contiguous_rows(must_skip)
    summaries = skipped = None
    if rule == "mass_summaries" and mask is not None:
        summaries = _empty_summaries(key)
        skipped = torch.empty_like(mask, memory_format=torch.contiguous_format)

    torch.ops.lite_attention.forward_sm90(
        query,
        key,
        value,
        out,
        lse,
        schedule,
        mask_rows,
        lse_rows,
        _contiguous_rows(thresholds),
        must_visit,
        must_skip,
        pairs_visited,
        summaries,
        skipped,
        scale,
        causal,
        get_args(Rule).index(rule),
    )
    for state, written in ((mask, mask_rows), (lse_state, lse_rows)):
        if state is not None and written is not None and written is not state:
            state.copy_(written)
    return out[..., :head_dim].contiguous(), lse


def summarize_blocks(key: Tensor, value: Tensor, must_skip: Tensor | None) -> Tensor:
    """As `lite_attention.reference.summarize_blocks`, in one tensor (3, batch, blocks, kv_heads, head_dim).

    Those of the blocks in ``must_skip``, int32 (words,), are zeros, whatever the blocks hold. With ``mass_summaries``
    `forward` does the same beside its own kernel.

    Args:
        key, value: (batch, tokens_k, kv_heads, head_dim), which the GPU's copy engine can read.
    """
    summaries = _empty_summaries(key)
    torch.ops.lite_attention.summarize_blocks_sm90(key, value, must_skip, summaries)
    return summaries


def _empty_summaries(key: Tensor) -> Tensor:
    batch, tokens_k, kv_heads, head_dim = key.shape
    return key.new_empty((3, batch, ceil_div(tokens_k, BLOCK_K), kv_heads, head_dim))


def _readable(tensor: Tensor) -> Tensor:
    """The tensor (batch, tokens, heads, head_dim), or a copy, padded with zeros, that the copy engine can read."""
    if padding := -tensor.shape[3] % ALIGNMENT:
        return pad(tensor, (0, padding)).contiguous()
    return tensor if cuda.is_aligned(tensor) else tensor.clone(memory_format=torch.contiguous_format)


def _contiguous_rows(tensor: Tensor | None) -> Tensor | None:
    """The tensor, or a copy, with a contiguous last dimension."""
    if tensor is None or tensor.shape[-1] < 2 or tensor.stride(-1) == 1:
        return tensor
    return tensor.contiguous()
