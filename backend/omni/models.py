"""Which attentions of a transformer of vLLM-Omni are long enough to skip in, and where their text tokens stand."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lite_attention.backend.denoising import TextAt


@dataclass(frozen=True)
class Family:
    """Transformers of one kind.

    Attributes:
        layers: matches the names of the `Attention` modules over the picture or video.
        text: where the tokens of the prompt stand in them; they are never skipped.
    """

    layers: re.Pattern[str]
    text: TextAt = "none"

    def picture_tokens(self, transformer: nn.Module, arguments: Mapping[str, Any]) -> int:
        """Tokens before the prompt's, where these stand at the end: patches of `hidden_states`."""
        patch: Any = transformer
        frames, height, width = arguments["hidden_states"].shape[2:]
        sizes = (frames // patch.patch_size_t, height // patch.patch_size, width // patch.patch_size)
        return math.prod(sizes)


def _family(layers: str, text: TextAt = "none") -> Family:
    return Family(re.compile(layers), text)


FAMILIES = {
    "FluxTransformer2DModel": _family(r"(single_)?transformer_blocks\.\d+\.attn\.attn", "start"),
    "HunyuanVideo15Transformer3DModel": _family(r"transformer_blocks\.\d+\.attn\.attn", "end"),
    "LTX2VideoTransformer3DModel": _family(r"transformer_blocks\.\d+\.attn1\.attn"),
    "QwenImageTransformer2DModel": _family(r"transformer_blocks\.\d+\.attn\.attn", "start"),
    "WanTransformer3DModel": _family(r"(vace_)?blocks\.\d+\.attn1\.attn"),
}
"""By the name of the class in vLLM-Omni, subclasses included."""


def family_of(module: nn.Module) -> Family | None:
    """The family of a transformer; None if it is of none that is known."""
    names = (base.__name__ for base in type(module).__mro__)
    return next((FAMILIES[name] for name in names if name in FAMILIES), None)


def conditioning(arguments: Mapping[str, Any]) -> Tensor | None:
    """What tells guidance branches apart: the prompt's embedding that a transformer is called with."""
    tensor = arguments.get("encoder_hidden_states")
    return tensor if isinstance(tensor, Tensor) and tensor.numel() else None
