"""Attention for inference that skips the key blocks which matter little, decided anew at every step."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lite_attention.version import __version__

if TYPE_CHECKING:
    from lite_attention.attention import LiteAttention, SeqParallelLiteAttention, merge_attention
    from lite_attention.report import Report, follow
    from lite_attention.state import SkipState

__all__ = [
    "LiteAttention",
    "Report",
    "SeqParallelLiteAttention",
    "SkipState",
    "__version__",
    "follow",
    "merge_attention",
]

_HOMES = {
    "LiteAttention": "lite_attention.attention",
    "SeqParallelLiteAttention": "lite_attention.attention",
    "merge_attention": "lite_attention.attention",
    "Report": "lite_attention.report",
    "follow": "lite_attention.report",
    "SkipState": "lite_attention.state",
}


def __getattr__(name: str) -> Any:
    # Found when first used, so that the commands' --help need not wait for PyTorch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
