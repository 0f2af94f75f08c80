"""What skipping costs: decode tokens that were computed with it are computed dense, too, and compared."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lite_attention.backend.vllm.state import LayerState


def add_errors(
    errors: Tensor,
    state: LayerState,
    out: Tensor,
    lse: Tensor,
    visited: Tensor,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    slots: Tensor,
    scale: float,
) -> None:
    """Compare what a layer gave some tokens with dense attention of the same inputs; the state stays as it is.

    Args:
        errors: (tokens, 2) float32; added are the L2 norm of the difference over that of the dense output, and 1.
        state: of the layer; its meter, if there is one, gets the same and more.
        out, lse: of the tokens, as `lite_attention.reference.decode` returns them with the arguments behind.
        visited: (tokens,) int32, blocks that the layer visited.
    """
    assert state.summaries is not None
    dense, dense_lse, blocks = torch.ops.lite_attention.decode(
        query,
        key_cache,
        value_cache,
        state.summaries,
        block_table,
        seq_lens,
        slots,
        torch.full_like(slots, -math.inf, dtype=torch.float32),
        torch.zeros_like(slots, dtype=torch.bool),
        state.mask,
        scale,
    )
    exact = dense.float().flatten(1)
    norm = exact.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    errors[:, 0] += (out.float().flatten(1) - exact).norm(dim=1) / norm
    errors[:, 1] += 1
    if state.meter is not None:
        state.meter.add(out, lse, dense, dense_lse, 1 - visited.sum() / blocks.sum())
