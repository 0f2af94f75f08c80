"""The attention class LITE_ATTN of vLLM-Omni: the platform's own backend, and skipping in the long self-attentions."""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from vllm_omni.diffusion.attention.backends.abstract import AttentionBackend, AttentionImpl, AttentionMetadata
from vllm_omni.diffusion.attention.selector import _cached_get_backend_cls
from vllm_omni.diffusion.config import get_current_diffusion_config_or_none

from lite_attention.backend.omni import execution, hooks
from lite_attention.backend.omni.plugin import NAME

_stock: type[AttentionBackend] = _cached_get_backend_cls(None, -1)  # -1: of any head size

_numbers = itertools.count()
_layers: WeakValueDictionary[int, LiteAttentionImpl] = WeakValueDictionary()


class LiteAttentionBackend(_stock):
    """The platform's default backend with its capabilities, under our name and with our implementation."""

    @staticmethod
    def get_name() -> str:
        """The name that configurations use."""
        return NAME

    @staticmethod
    def get_impl_cls() -> type[LiteAttentionImpl]:
        """The class of a layer's implementation."""
        return LiteAttentionImpl


class LiteAttentionImpl(AttentionImpl):
    """One attention layer.

    Attributes:
        number: of the layer in this process.
        name: of a long layer in its pipeline, as calibrations call it; "" before its first request.
        heads: query heads of the layer, on all tensor-parallel ranks together.
        head_dim: of a head.
        scale: factor of q·k.
        reason: why this layer can never skip; None if it can.
        is_long: whether it attends over the picture or video of a transformer that is known.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        softmax_scale: float,
        causal: bool = False,
        num_kv_heads: int | None = None,
        **extra: Any,
    ) -> None:
        """A layer; `extra` goes to the platform's own implementation.

        Raises:
            ValueError: ring parallelism, or server options that cannot be used.
        """
        config = get_current_diffusion_config_or_none()
        if config is not None and config.parallel_config.ring_degree > 1:
            raise ValueError(
                f"{NAME} does not support ring parallelism (ring_degree={config.parallel_config.ring_degree}): "
                "vLLM-Omni computes its attention without asking the backend. Use Ulysses or all-gather parallelism."
            )
        hooks.install(config)
        stock = _cached_get_backend_cls(None, head_size).get_impl_cls()
        self.stock = stock(
            num_heads=num_heads,
            head_size=head_size,
            softmax_scale=softmax_scale,
            causal=causal,
            num_kv_heads=num_kv_heads,
            **extra,
        )
        ranks = 1 if config is None else getattr(config.parallel_config, "tensor_parallel_size", 1)
        self.name = ""
        self.heads = num_heads * ranks
        self.head_dim = head_size
        self.scale = softmax_scale
        self.reason = "a layer is causal" if causal else None
        self.is_long = False
        self.number = next(_numbers)
        # A tensor, so that compiled blocks share their code: a number would be compiled into it.
        self.handle = torch.tensor(self.number, device="cpu")
        _layers[self.number] = self

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: AttentionMetadata | None = None
    ) -> Tensor:
        """Attention, tensors (batch, tokens, heads, head_dim)."""
        if not self.is_long:
            return self.stock.forward(query, key, value, attn_metadata)
        reason = self.reason or _reason(attn_metadata)
        if reason is not None:
            _say_once(reason)
            return self.stock.forward(query, key, value, attn_metadata)
        mask = None if attn_metadata is None else attn_metadata.attn_mask
        return torch.ops.lite_attention.denoise_attention(query, key, value, mask, self.handle)

    def forward_paged(self, paged_kv_context: Any) -> Tensor:
        """Attention to a paged cache, always by the platform's own backend."""
        _say_once("keys and values are paged")
        return self.stock.forward_paged(paged_kv_context)

    def dense(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of the platform's own backend."""
        metadata = None if mask is None else AttentionMetadata(attn_mask=mask)
        return self.stock.forward(query, key, value, metadata)


@torch.library.custom_op("lite_attention::denoise_attention", mutates_args=())
def denoise_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, layer: Tensor) -> Tensor:
    """Attention of a layer, by its number, for the requests that this thread executes."""
    impl = _layers[int(layer)]
    running = execution.current()
    if running is None:
        _say_once("no request is known (step execution, a call from outside)")
        return impl.dense(query, key, value, mask).contiguous()
    return running.attend(impl, query, key, value, mask).contiguous()


@denoise_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, layer: Tensor) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


_PACKED = ("cu_seqlens_q", "cu_seqlens_k", "valid_kv_length")
"""Entries of a metadata's `extra` that change what is attended to; unknown ones are to be ignored."""


def _reason(metadata: AttentionMetadata | None) -> str | None:
    """Why attention with such metadata is dense."""
    if metadata is None:
        return None
    if metadata.full_attn_spans is not None:
        return "parts of a sequence are causal"
    if any(name in metadata.extra for name in _PACKED):
        return "sequences are packed or padded in a way that a mask does not tell"
    if metadata.extra.get("kv_cache_dtype") not in (None, "float"):
        return "keys and values are quantized"
    if getattr(metadata, "packed_padding", None) is not None:
        return "sequences are packed"
    return None


@torch.compiler.assume_constant_result
def _say_once(reason: str) -> None:
    execution.say_once(reason)
