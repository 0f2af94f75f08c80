"""Which attentions of a transformer are long enough to skip in, and where their text tokens stand."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from lite_attention.backend.denoising import TextAt


@dataclass(frozen=True)
class Family:
    """Transformers of one kind.

    Attributes:
        layers: matches the names of the modules whose self-attention is over the picture or video.
        text: where the tokens of the prompt stand in that attention; they are never skipped.
        chooses_backend: whether attention processors call the attention function of a backend that they name; else
            they call PyTorch's `scaled_dot_product_attention`.
    """

    layers: re.Pattern[str]
    text: TextAt = "none"
    chooses_backend: bool = True


def _family(layers: str, text: TextAt = "none", chooses_backend: bool = True) -> Family:
    return Family(re.compile(layers), text, chooses_backend)


FAMILIES = {
    "CogVideoXTransformer3DModel": _family(r"transformer_blocks\.\d+\.attn1", "start", chooses_backend=False),
    "FluxTransformer2DModel": _family(r"(single_)?transformer_blocks\.\d+\.attn", "start"),
    "HunyuanVideoTransformer3DModel": _family(r"(single_)?transformer_blocks\.\d+\.attn", "end"),
    "LTXVideoTransformer3DModel": _family(r"transformer_blocks\.\d+\.attn1"),
    "QwenImageTransformer2DModel": _family(r"transformer_blocks\.\d+\.attn", "start"),
    "WanTransformer3DModel": _family(r"blocks\.\d+\.attn1"),
    "WanVACETransformer3DModel": _family(r"(vace_)?blocks\.\d+\.attn1"),
}
"""By the name of the class in diffusers, subclasses included."""


def family_of(transformer: nn.Module) -> Family | None:
    """The family of a transformer; None if it is of none that is known."""
    names = (base.__name__ for base in type(transformer).__mro__)
    return next((FAMILIES[name] for name in names if name in FAMILIES), None)


def attentions(transformer: nn.Module, family: Family) -> dict[str, nn.Module]:
    """The attention modules to skip in, by name, in the order of the layers.

    Raises:
        ValueError: there are none, or one has a processor that chooses no attention backend.
    """
    found = {name: module for name, module in transformer.named_modules() if family.layers.fullmatch(name)}
    if not found:
        raise ValueError(f"pipeline: expected attentions named {family.layers.pattern} in its transformer, found none")
    for name, module in found.items():
        processor = getattr(module, "processor", None)
        if family.chooses_backend and not hasattr(processor, "_attention_backend"):
            raise ValueError(
                f"pipeline: expected an attention processor that lets choose its backend at {name}, "
                f"got {type(processor).__name__}"
            )
    return found
