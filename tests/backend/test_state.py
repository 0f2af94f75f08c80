"""Summaries beside the KV cache."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lite_attention.backend.vllm import state
from lite_attention.backend.vllm.state import LayerState


def layer() -> LayerState:
    return LayerState(slots=2, heads=2, kv_heads=1, max_tokens=64)


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
    assert support.summaries_share(engine, specs) == pytest.approx((2 * 128 + 8) / (2 * 2 * 128 * 16))
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
