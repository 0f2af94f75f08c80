"""Summaries beside the KV cache."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lite_attention.backend.vllm import state
from lite_attention.backend.vllm.state import LayerState


def layer() -> LayerState:
    return LayerState(slots=2, kv_heads=1, max_tokens=64)


def test_layers_that_share_a_cache_share_its_summaries() -> None:
    keys, others = torch.zeros(6, 32, 1, 16), torch.zeros(6, 32, 1, 16)
    first, second, third = layer(), layer(), layer()
    assert first.summaries_of(keys) is first.summaries_of(keys) is second.summaries_of(keys)
    assert third.summaries_of(others) is not first.summaries
    assert first.summaries_of(keys[:2]).shape[0] == 2


def test_summaries_go_along_when_the_engine_copies_blocks() -> None:
    keys = torch.zeros(6, 16, 1, 16)
    layers = [layer(), layer(), layer()]
    summaries = layers[0].summaries_of(keys)
    assert layers[1].summaries_of(keys) is summaries
    summaries.copy_(torch.arange(6)[:, None, None, None].expand_as(summaries))
    state.copy_blocks(layers, [(0, 2), (2, 1)], blocks=3)  # of two pages; all are read before one is written
    assert summaries[:, 0, 0, 0].tolist() == [0, 1, 4, 5, 0, 1]


def test_layers_that_skip_are_numbered_in_their_order() -> None:
    states = [layer(), layer()]
    impls = SimpleNamespace(state=states[0]), SimpleNamespace(state=None), SimpleNamespace(state=states[1])
    engine = config(**{f"layer {number}": SimpleNamespace(impl=impl) for number, impl in enumerate(impls)})
    assert state.number_layers(engine) == ["layer 0", "layer 2"]
    assert [of_layer.number for of_layer in states] == [0, 1]


@pytest.mark.parametrize(
    ("share", "mode", "refused"),
    [(0.1, "FULL", True), (0.1, "FULL_AND_PIECEWISE", True), (0.1, "PIECEWISE", False), (0, "FULL", False)],
)
def test_checks_are_refused_where_graphs_hold_the_attention(share: float, mode: str, refused: bool) -> None:
    support = pytest.importorskip("lite_attention.backend.vllm.support", exc_type=ImportError)
    from vllm.config import CUDAGraphMode

    engine = config()
    engine.compilation_config.cudagraph_mode = CUDAGraphMode[mode]
    engine.additional_config = {"lite_attn": {"check_share": share}}
    if not refused:
        assert support.server_options(engine).check_share == share
        return
    with pytest.raises(ValueError, match=rf"lite_attn.check_share: expected 0 .*\({mode}\), got 0.1; --enforce-eager"):
        support.server_options(engine)


def config(**layers: Any) -> SimpleNamespace:
    return SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers))


def test_memory_for_summaries_is_that_of_the_layers_that_skip() -> None:
    support = pytest.importorskip("lite_attention.backend.vllm.support", exc_type=ImportError)

    def spec(head_size: int, block_size: int) -> SimpleNamespace:
        page = 2 * 2 * 4 * head_size * block_size  # keys and values, bfloat16, four KV heads
        return SimpleNamespace(num_kv_heads=4, head_size=head_size, block_size=block_size, page_size_bytes=page)

    skips = SimpleNamespace(impl=SimpleNamespace(state=layer()))
    stock = SimpleNamespace(impl=SimpleNamespace(state=None))
    engine = config(a=skips, b=skips, c=stock, d=SimpleNamespace())
    assert list(state.skipping_layers(engine)) == ["a", "b"]
    specs = {"a": spec(128, 16), "b": spec(128, 64), "c": spec(64, 16)}
    assert support.summaries_share(engine, specs) == pytest.approx((2 * 128 + 16) / (2 * 2 * 128 * 16))
    assert support.summaries_share(config(c=stock), specs) == 0


@pytest.mark.parametrize("setting", [{"enable_dbo": True}, {"ubatch_size": 2}, {"decode_context_parallel_size": 2}])
def test_where_rows_are_not_whole_requests_nothing_skips(setting: dict[str, Any]) -> None:
    support = pytest.importorskip("lite_attention.backend.vllm.support", exc_type=ImportError)
    plain = SimpleNamespace(
        parallel_config=SimpleNamespace(), speculative_config=None, kv_transfer_config=None, model_config=None
    )
    assert support.config_reason(plain) is None
    plain.parallel_config = SimpleNamespace(**setting)
    assert support.config_reason(plain) == "parallelism"


def test_only_what_was_computed_densely_is_shared_as_a_prefix() -> None:
    hooks = pytest.importorskip("lite_attention.backend.vllm.hooks", exc_type=ImportError)
    cached: list[int] = []
    coordinator = SimpleNamespace(cache_blocks=lambda _, tokens: cached.append(tokens))
    scheduler = SimpleNamespace(kv_cache_manager=SimpleNamespace(coordinator=coordinator))
    engine = SimpleNamespace(
        parallel_config=SimpleNamespace(),
        speculative_config=None,
        kv_transfer_config=None,
        model_config=None,
        additional_config={},
    )
    hooks._keep_skipping_out_of_the_prefix_cache(lambda *_: None, scheduler, engine)

    def cache(request: SimpleNamespace, tokens: int) -> int:
        coordinator.cache_blocks(request, tokens)
        return cached[-1]

    def options(**args: Any) -> SimpleNamespace:
        return SimpleNamespace(extra_args={f"lite_attn_{name}": value for name, value in args.items()})

    dense = SimpleNamespace(sampling_params=options(enable=False), num_prompt_tokens=32)
    assert (cache(dense, 20), cache(dense, 50)) == (20, 50)
    skips = SimpleNamespace(sampling_params=options(), num_prompt_tokens=32)
    assert (cache(skips, 20), cache(skips, 50)) == (20, 32)
    # More input: what was generated is part of the prompt now, and was still computed under skipping.
    skips.num_prompt_tokens = 64
    assert cache(skips, 64) == 32
    skips.sampling_params = options(enable=False)
    assert cache(skips, 80) == 32
