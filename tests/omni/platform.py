"""The CPU as a platform of vLLM-Omni, which brings none."""

from __future__ import annotations

from typing import Any

import torch
from vllm.platforms.cpu import CpuPlatform
from vllm_omni.diffusion import ipc
from vllm_omni.platforms.interface import OmniPlatform, OmniPlatformEnum


def plugin() -> str:
    """Entry point `vllm_omni.platform_plugins`."""
    return f"{__name__}.{CpuOmniPlatform.__name__}"


class CpuOmniPlatform(OmniPlatform, CpuPlatform):  # type: ignore[misc]
    """As much of a platform as a diffusion pipeline in the engine's own process asks for."""

    _omni_enum = OmniPlatformEnum.OOT

    @classmethod
    def get_diffusion_attn_backend_cls(cls, selected_backend: str | None, *args: Any, **kwargs: Any) -> str:
        """The class of a backend; PyTorch's attention is the default."""
        from vllm_omni.diffusion.attention.backends.abstract import AttentionImpl
        from vllm_omni.diffusion.attention.backends.registry import DiffusionAttentionBackendEnum

        AttentionImpl.forward = _forward
        ipc._tensor_to_shm = _to_shared_memory
        name = (selected_backend or "TORCH_SDPA").upper()
        cls.validate_diffusion_attn_backend(name)
        return str(DiffusionAttentionBackendEnum[name].get_path())

    @classmethod
    def get_torch_device(cls, local_rank: int | None = None) -> torch.device:
        return torch.device("cpu")

    @classmethod
    def get_device_count(cls) -> int:
        return 1

    @classmethod
    def set_device(cls, device: torch.device) -> None: ...

    @classmethod
    def synchronize(cls) -> None: ...

    @classmethod
    def is_available(cls) -> bool:
        """Whether there is an accelerator."""
        return False

    @classmethod
    def reset_peak_memory_stats(cls) -> None: ...

    @classmethod
    def max_memory_reserved(cls) -> int:
        return 0

    @classmethod
    def max_memory_allocated(cls) -> int:
        return 0

    @classmethod
    def supports_torch_inductor(cls) -> bool:
        return True


_stock_to_shared_memory = ipc._tensor_to_shm


def _to_shared_memory(tensor: torch.Tensor, d2h_stream: Any = None, **others: Any) -> Any:
    # On a stream the stock one copies by way of pinned memory, which only accelerators have.
    return _stock_to_shared_memory(tensor, **others)


def _forward(self: Any, *args: Any) -> torch.Tensor:
    # The stock one knows GPUs and raises elsewhere.
    return self.forward_cuda(*args)  # type: ignore[no-any-return]
