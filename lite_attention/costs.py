"""What skipping costs a layer, measured against dense attention of the same inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # slow to import, and a server's options are checked before an engine needs it
    from torch import Tensor


@dataclass(frozen=True)
class Cost:
    """What skipping cost a layer, over the steps of a run that could skip.

    Attributes:
        error: L2 norm of the output's difference to dense attention of the same inputs, over the norm of that.
        dropped: share of the softmax's mass that was skipped, mean over queries.
        sparsity: share of (query tile, key block) pairs that was skipped.
    """

    error: float
    dropped: float
    sparsity: float


@dataclass(frozen=True)
class DecodeShape:
    """Of the model whose decode steps thresholds were found for, all tensor-parallel ranks together."""

    architecture: str
    heads: int
    kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.architecture} with {self.heads} query and {self.kv_heads} KV heads of {self.head_dim}"


@dataclass(frozen=True)
class Shape:
    """Of the attention that thresholds were found for. They hold for no other number of tokens."""

    tokens: int
    heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.tokens:,} keys, {self.heads} heads of {self.head_dim}"


class Meter:
    """Measures what skipping costs a layer; never waits for the device before it is read."""

    def __init__(self) -> None:
        self.shape: Shape | None = None
        self._sums: Tensor | float = 0.0
        self._calls = 0

    def add(
        self,
        out: Tensor,
        lse: Tensor,
        dense: Tensor,
        dense_lse: Tensor,
        sparsity: Tensor | float,
        shape: Shape | None = None,
    ) -> None:
        """Note a call.

        Args:
            out: (batch, tokens_q, heads, head_dim), of skipping attention; ``dense`` of dense attention.
            lse: float32 (batch, heads, tokens_q) of the visited scores, ``dense_lse`` of all; natural log.
            sparsity: share of pairs that was skipped.
            shape: kept, where thresholds hold for no other.
        """
        import torch

        difference = (out.float() - dense.float()).square().sum(dtype=torch.float64)
        norm = dense.float().square().sum(dtype=torch.float64)
        # Sums throughout: vLLM's batch-invariant mode replaces PyTorch's mean by one that knows no float64.
        dropped = -torch.expm1((lse - dense_lse).clamp(max=0.0)).sum(dtype=torch.float64) / lse.numel()
        share = torch.as_tensor(sparsity, dtype=torch.float64, device=out.device)
        self._sums = self._sums + torch.stack((difference, norm, dropped, share))
        self._calls += 1
        self.shape = shape

    def read(self) -> Cost:
        """What was noted since the last time, and begin anew; zeros where nothing was."""
        sums, calls = self._sums, self._calls
        if isinstance(sums, float):
            return Cost(error=0.0, dropped=0.0, sparsity=0.0)
        difference, norm, dropped, share = sums.tolist()
        self._sums, self._calls = 0.0, 0
        error = math.sqrt(difference / norm) if norm else 0.0
        return Cost(error=error, dropped=dropped / calls, sparsity=share / calls)
