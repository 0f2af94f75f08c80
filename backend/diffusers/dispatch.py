"""How attention of diffusers comes to us.

Most attention processors name a backend, and the function of that name is called with tensors only: `register` enters
ours. Which layer it is for says the hook around the attention module, which has set it just before, in the same thread.
Other processors call PyTorch's attention: `InsteadOfTorch` takes their calls.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

NAME = "lite_attn"

Attend = Callable[..., Tensor]
"""Called as PyTorch's `scaled_dot_product_attention`, but with tensors (batch, tokens, heads, head_dim)."""

_next = threading.local()


def set_attend(attend: Attend) -> None:
    """Say who computes the attention that comes next in this thread: called as the function of a backend."""
    _next.attend = attend


@torch.compiler.disable
def _lite_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    attend: Attend | None = getattr(_next, "attend", None)
    if attend is None:
        raise RuntimeError(f"the attention backend {NAME} works only in pipelines after enable(pipeline)")
    return attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, _parallel_config)


class InsteadOfTorch(TorchFunctionMode):
    """While it is entered, calls of `scaled_dot_product_attention` go to `attend`."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return (self._instead if func is scaled_dot_product_attention else func)(*args, **kwargs)

    def _instead(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        by_token = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return self.attend(*by_token, *args, **kwargs).transpose(1, 2)


def register() -> AttentionBackendName:
    """Our member of the names of backends, made and registered if need be."""
    if NAME not in AttentionBackendName._value2member_map_:
        member = str.__new__(AttentionBackendName, NAME)
        member._name_ = NAME.upper()
        member._value_ = NAME
        AttentionBackendName._member_map_[member._name_] = member
        AttentionBackendName._value2member_map_[NAME] = member
        AttentionBackendName._member_names_.append(member._name_)
        _AttentionBackendRegistry.register(member)(_lite_attention)
    return AttentionBackendName(NAME)
