"""What the decode kernel is told of a batch's rows, at addresses that stay."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lite_attention.backend.requests import SCRATCH_SLOT, DecodeToken
from lite_attention.backend.vllm import launches
from lite_attention.backend.vllm.launches import Launches, RowFields
from lite_attention.backend.vllm.steps import Wave
from lite_attention.decode_cuda import MAX_ROWS

ROWS, LAYERS = 9, 3

batches = st.dictionaries(
    st.integers(0, ROWS - 1),
    st.builds(
        DecodeToken,
        request_id=st.just("a"),
        position=st.integers(0, 100),
        slot=st.integers(1, 50),
        threshold=st.floats(-20, 0, width=32),
        visit_all=st.booleans(),
    ),
)


def wave(batch: dict[int, DecodeToken]) -> Wave | None:
    rows = list(batch)
    return Wave(list(batch.values()), rows, rows, by_layer(batch)) if batch else None


def by_layer(batch: dict[int, DecodeToken]) -> torch.Tensor:
    return torch.tensor([[token.threshold - layer for token in batch.values()] for layer in range(LAYERS)])


@given(st.lists(batches, min_size=1, max_size=4))
def test_each_batch_is_staged_whole_and_in_place(staged: list[dict[int, DecodeToken]]) -> None:
    fields = RowFields(ROWS, LAYERS, "cpu")
    addresses = [tensor.data_ptr() for tensor in (fields.slots, fields.thresholds, fields.visited, fields.visit_all)]
    for batch in staged:
        fields.visited += 7  # as the layers of the step before do
        fields.stage(wave(batch))
        assert fields.visited.tolist() == [0] * ROWS
        for row in range(ROWS):
            told = fields.slots[row].item(), fields.thresholds[:, row].tolist(), fields.visit_all[row].item()
            token = batch.get(row)
            expected = (SCRATCH_SLOT, [-math.inf] * LAYERS, False)
            if token is not None:
                expected = token.slot, by_layer({row: token}).flatten().tolist(), token.visit_all
            assert told == expected
        for layer in range(LAYERS):  # a kernel is told of its layer by an address, and that the rows lie side by side
            assert fields.thresholds[layer].is_contiguous()
    assert addresses == [t.data_ptr() for t in (fields.slots, fields.thresholds, fields.visited, fields.visit_all)]


def test_before_the_first_batch_every_row_is_dense() -> None:
    fields = RowFields(ROWS, LAYERS, "cpu")
    assert fields.slots.tolist() == [SCRATCH_SLOT] * ROWS
    assert fields.thresholds.tolist() == [[-math.inf] * ROWS] * LAYERS
    assert not fields.visit_all.any()


def bytes_of(rows: int, heads: int, kv_heads: int, head_dim: int, max_tokens: int) -> int:
    return rows * heads * max_tokens


def test_scratch_memory_holds_the_largest_layer_and_large_launches_are_split(monkeypatch: Any) -> None:
    monkeypatch.setattr(launches, "workspace_bytes", bytes_of)
    monkeypatch.setattr(launches, "MAX_WORKSPACE_BYTES", 4096)
    shared = Launches({}, rows=100, device=torch.device("cpu"))
    assert shared.reserve(1, 1, 64, max_tokens=10) == 100
    assert (len(shared.workspace), len(shared.lse)) == (1000, 100)
    assert shared.reserve(2, 1, 64, max_tokens=64) == 25
    assert (len(shared.workspace), len(shared.lse)) == (25 * 2 * 64, 100)
    assert shared.reserve(1, 1, 64, max_tokens=10) == 100
    assert shared.reserve(1, 1, 64, max_tokens=10**6) == 1
    assert len(shared.workspace) == 10**6
    assert Launches({}, rows=MAX_ROWS + 1, device=torch.device("cpu")).reserve(1, 1, 64, 1) == MAX_ROWS


def config(layers: dict[str, Any], max_num_seqs: int = 4, capture: int | None = 8) -> SimpleNamespace:
    compilation = SimpleNamespace(static_forward_context=layers, max_cudagraph_capture_size=capture)
    return SimpleNamespace(compilation_config=compilation, scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs))


@pytest.mark.parametrize(("seqs", "capture", "rows"), [(4, 8, 8), (16, 8, 16), (4, None, 4)])
def test_the_layers_of_an_engine_share_their_launches(seqs: int, capture: int | None, rows: int) -> None:
    device = torch.device("cpu")
    first, second = {}, {}
    ours = launches.of_engine(config(first, seqs, capture), device)
    assert launches.of_engine(config(first, seqs, capture), device) is ours
    assert launches.of_engine(config(second, seqs, capture), device) is not ours
    assert ours.fields(LAYERS) is ours.fields(LAYERS)
    assert ours.fields(LAYERS).thresholds.shape == (LAYERS, rows)
