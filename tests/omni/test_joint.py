"""Joint attention over the tokens of a prompt and of a picture, masks, and calls that cannot be told apart."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lite_attention.serving.params import DenoiseOptions
from tests.omni.conftest import cpu_only
from tests.omni.prepare import prepare

pytestmark = cpu_only

TEXT, GRID = 70, (1, 20, 16)
PICTURE = 320
OPTIONS = DenoiseOptions(threshold=-0.01, enable=True, refresh_interval=0, warmup_steps=0, cooldown_steps=0)


def transformer(name: str, text_first: bool) -> Any:
    """A transformer of vLLM-Omni by its name, reduced to one attention."""
    prepare()
    from lite_attention.backend.omni.attention import LiteAttentionImpl

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = LiteAttentionImpl(num_heads=1, head_size=16, softmax_scale=1.0)

    class Joint(nn.Module):
        patch_size = patch_size_t = 1

        def __init__(self) -> None:
            super().__init__()
            self.transformer_blocks = nn.ModuleList([nn.ModuleDict({"attn": nn.ModuleDict({"attn": Attention()})})])

        @property
        def impl(self) -> Any:
            return self.transformer_blocks[0]["attn"]["attn"].attention

        def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
            from vllm_omni.diffusion.attention.backends.abstract import AttentionMetadata

            picture = hidden_states.flatten(2).transpose(1, 2)
            parts = [encoder_hidden_states, picture] if text_first else [picture, encoder_hidden_states]
            tokens = torch.cat(parts, 1).unsqueeze(2)
            out: Tensor = self.impl.forward(tokens, tokens, tokens, AttentionMetadata(attn_mask=mask))
            return out

    Joint.__name__ = name
    made = Joint()
    made.impl.stock.forward = made.impl.stock.forward_cuda  # no platform is chosen here
    return made


def run(
    module: Any, steps: int = 6, mask: Tensor | None = None, new_embeddings: bool = False
) -> tuple[Any, list[Tensor]]:
    """The request, and the masks of its states after the last step."""
    from lite_attention.backend.omni.execution import Request, executing
    from lite_attention.backend.omni.pool import StatePool

    generator = torch.Generator().manual_seed(0)
    request = Request("one", OPTIONS, 1)
    text = torch.randn(1, TEXT, 16, generator=generator)
    masks: list[Tensor] = []
    with torch.no_grad(), executing(nn.ModuleDict({"transformer": module}), [request], StatePool()):
        for _ in range(steps):
            sample = 2 * torch.randn(1, 16, *GRID, generator=generator)
            module(sample, encoder_hidden_states=text.clone() if new_embeddings else text, mask=mask)
            masks = [attention.skip_state.mask.clone() for attention, _ in request.states.values()]
    assert not request.states
    return request, masks


@pytest.mark.parametrize(
    ("name", "text_first"),
    [
        ("HunyuanVideo15Transformer3DModel", False),
        ("QwenImageTransformer2DModel", True),
        ("FluxTransformer2DModel", True),
    ],
)
def test_the_prompt_is_always_visited(name: str, text_first: bool) -> None:
    module = transformer(name, text_first)
    assert list(inspect.signature(module.forward).parameters)[1] == "encoder_hidden_states"
    request, (mask,) = run(module)
    words = mask[0, 0, :, 0]
    visited = torch.stack([(words >> block) & 1 for block in range(7)], 1).bool()  # (tiles, blocks)
    prompt = [0, 1] if text_first else [5, 6]
    assert bool(visited[:, prompt].all())
    others = [block for block in range(7) if block not in prompt]
    assert not bool(visited[:, others].all())
    assert float(request.visited) < request.total


def test_a_mask_of_the_last_keys_is_cut_off_and_others_are_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    module = transformer("HunyuanVideo15Transformer3DModel", False)
    from lite_attention.backend.omni import execution

    said: list[str] = []
    monkeypatch.setattr(execution, "say_once", lambda reason: said.append(reason) if reason else None)
    mask = torch.ones(1, PICTURE + TEXT, dtype=torch.bool)
    mask[:, -30:] = False
    request, _ = run(module, mask=mask)
    assert float(request.visited) < request.total and not said
    mask[:, 5] = False
    request, masks = run(module, mask=mask)
    assert float(request.visited) == request.total and not masks
    assert set(said) == {"an attention mask hides other keys than the last ones"}


def test_new_embeddings_at_each_step_are_no_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    module = transformer("QwenImageTransformer2DModel", True)
    from lite_attention.backend.omni import execution

    said: list[str] = []
    monkeypatch.setattr(execution, "say_once", lambda reason: said.append(reason) if reason else None)
    request, masks = run(module, steps=12, new_embeddings=True)
    assert len(masks) == execution.MAX_BRANCHES  # one visit each: nothing was skipped with another's state
    assert float(request.visited) == request.total
    assert set(said) == {"the guidance branch of a call of the transformer is not known"}
