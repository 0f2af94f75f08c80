"""LITE_ATTN on CUDA: stock FlashAttention until the decode operator has a CUDA implementation."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend, FlashAttentionMetadataBuilder

from lite_attention.backend.vllm import hooks, support

support.warn_of_untested_version("cuda")
hooks.install_worker_hooks(follow_steps=False)


class LiteAttentionBackend(FlashAttentionBackend):
    """vLLM's FlashAttention; every layer is dense, and says so at start-up."""

    @staticmethod
    def get_builder_cls() -> type[LiteMetadataBuilder]:
        return LiteMetadataBuilder


class LiteMetadataBuilder(FlashAttentionMetadataBuilder):
    """Says at start-up what LITE_ATTN does with these layers."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        support.report(vllm_config, layer_names, "platform", 0, (False, "no CUDA kernels yet"))
