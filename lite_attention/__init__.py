"""Attention for inference that skips the key blocks which matter little, decided anew at every step."""

from lite_attention.attention import LiteAttention, SeqParallelLiteAttention, merge_attention
from lite_attention.state import SkipState
from lite_attention.version import __version__

__all__ = ["LiteAttention", "SeqParallelLiteAttention", "SkipState", "__version__", "merge_attention"]
