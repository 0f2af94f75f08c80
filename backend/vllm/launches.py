"""What the layers of an engine launch the CUDA decode kernel with: memory at fixed addresses, which graphs replay."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor

from lite_attention.backend.vllm.steps import Wave
from lite_attention.decode_cuda import MAX_ROWS, workspace_bytes
from lite_attention.tiles import ceil_div

MAX_WORKSPACE_BYTES = 2**29
"""A launch that needs more memory than this is done in parts."""


class RowFields:
    """What the kernel is told of each row of a batch, and what it counts: views of one buffer, filled by one copy.

    Attributes:
        slots: (rows,) int32.
        thresholds: (layers, rows) float32.
        visited: (rows,) int32.
        visit_all: (rows,) bool.
    """

    def __init__(self, rows: int, layers: int, device: torch.device | str, pinned: bool = False) -> None:
        self.rows, self.layers = rows, layers
        sizes = (4 * rows, 4 * layers * rows, 4 * rows, rows)
        self.buffer = torch.zeros(sum(sizes), dtype=torch.uint8, device=device, pin_memory=pinned)
        slots, thresholds, visited, visit_all = self.buffer.split(sizes)
        self.slots = slots.view(torch.int32)
        self.thresholds = thresholds.view(torch.float32).view(layers, rows).fill_(-math.inf)
        self.visited = visited.view(torch.int32)
        self.visit_all = visit_all.view(torch.bool)

    def stage(self, wave: Wave | None) -> None:
        """Prepare a batch: the rows of `wave` skip, all others, padding among them, are dense; nothing is visited yet.

        The copy takes its place among the work launched so far. It starts from new memory each time: the host may
        be a step ahead of the device, and the last copy still waiting.
        """
        host = RowFields(self.rows, self.layers, "cpu", pinned=self.buffer.is_cuda)
        if wave is not None:
            host.slots[wave.rows] = wave.slots
            host.thresholds[:, wave.rows] = wave.thresholds
            host.visit_all[wave.rows] = wave.visit_all
        self.buffer.copy_(host.buffer, non_blocking=True)


class Launches:
    """Shared by all layers of an engine, whose launches follow one another.

    Attributes:
        rows: of the largest batch.
        workspace: uint8; see `lite_attention.decode_cuda.decode_into`.
        lse: float32, written by the kernel, read where tokens are checked.

    Args:
        layers: the engine's layers by name; only tells engines apart.
    """

    def __init__(self, layers: dict[str, Any], rows: int, device: torch.device) -> None:
        self.layers, self.rows, self.device = layers, rows, device
        self._fields: RowFields | None = None
        self.workspace = torch.zeros(0, dtype=torch.uint8, device=device)
        self.lse = torch.empty(0, dtype=torch.float32, device=device)

    def reserve(self, heads: int, kv_heads: int, head_dim: int, max_tokens: int) -> int:
        """Have memory for a layer of this shape; returns how many rows a launch of it may have."""
        rows = min(self.rows, MAX_ROWS)
        while rows > 1 and workspace_bytes(rows, heads, kv_heads, head_dim, max_tokens) > MAX_WORKSPACE_BYTES:
            rows = ceil_div(rows, 2)
        self.workspace = _at_least(self.workspace, workspace_bytes(rows, heads, kv_heads, head_dim, max_tokens))
        self.lse = _at_least(self.lse, rows * heads)
        return rows

    def fields(self, layers: int) -> RowFields:
        """Of the rows of a batch in which every row has one token; so many layers, which do not change."""
        if self._fields is None:
            with torch.inference_mode(False):  # written in that mode and outside of it
                self._fields = RowFields(self.rows, layers, self.device)
        assert self._fields.layers == layers
        return self._fields

    def memory_bytes(self) -> int:
        return self.workspace.nbytes + self.lse.nbytes


def _at_least(tensor: Tensor, size: int) -> Tensor:
    return tensor if len(tensor) >= size else tensor.new_zeros(size)


_latest: weakref.ref[Launches] | None = None


def of_engine(vllm_config: Any, device: torch.device) -> Launches:
    """The launches of the engine that is being loaded; its first layer creates them."""
    global _latest
    compilation = vllm_config.compilation_config
    layers = compilation.static_forward_context
    launches = _latest() if _latest is not None else None
    if launches is None or launches.layers is not layers:
        rows = max(vllm_config.scheduler_config.max_num_seqs, compilation.max_cudagraph_capture_size or 0)
        launches = Launches(layers, rows, device)
        _latest = weakref.ref(launches)
    return launches
