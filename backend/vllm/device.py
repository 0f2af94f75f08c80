"""How the host sends small tensors to a device and reads them back without waiting for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on a device; work that was launched before goes on meanwhile."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class Readback:
    """The values that a tensor has when the work launched so far is done."""

    def __init__(self, tensor: Tensor) -> None:
        self._values = tensor.to("cpu", non_blocking=True)
        self._copied: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def arrived(self) -> bool:
        """Whether `values` would return at once."""
        return self._copied is None or self._copied.query()

    def values(self) -> list[Any]:
        """The values, waited for if need be."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()
