"""What vLLM-Omni loads in each of its processes: the name LITE_ATTN, and nothing else until it is asked for."""

from __future__ import annotations

NAME = "LITE_ATTN"

_BACKEND = "lite_attention.backend.omni.attention.LiteAttentionBackend"


def register() -> None:
    """Entry point `vllm_omni.general_plugins`: make the name known. Idempotent."""
    from aenum import extend_enum
    from vllm_omni.diffusion.attention.backends.registry import DiffusionAttentionBackendEnum

    if NAME not in DiffusionAttentionBackendEnum.__members__:
        extend_enum(DiffusionAttentionBackendEnum, NAME, _BACKEND)
