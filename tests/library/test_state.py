"""SkipState: ranges, sparsity, memory, reset."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lite_attention import SkipState
from lite_attention.ranges import pack_bits, unpack_bits
from lite_attention.tiles import BLOCK_K, TILE_Q, ceil_div
from tests.library.forward_cases import ALL_RULES


@st.composite
def states(draw: st.DrawFn) -> SkipState:
    slots, heads = draw(st.integers(0, 3)), draw(st.integers(1, 3))
    tokens_q, tokens_k = draw(st.integers(0, 3 * TILE_Q)), draw(st.integers(0, 40 * BLOCK_K))
    state = SkipState(slots, heads, tokens_q, tokens_k, rule=draw(st.sampled_from(ALL_RULES)))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    bits = torch.rand((*state.mask.shape[:3], state.blocks), generator=random) < draw(st.floats(0, 1))
    state.mask.copy_(pack_bits(bits))
    return state


@settings(max_examples=40, deadline=None)
@given(states())
def test_ranges_round_trip(state: SkipState) -> None:
    ranges = state.to_ranges()
    copy = SkipState.from_ranges(ranges, state.tokens_q, state.tokens_k, rule=state.rule)
    assert copy.to_ranges() == ranges
    if ranges:
        assert torch.equal(copy.mask, state.mask)


@settings(max_examples=40, deadline=None)
@given(states())
def test_sparsity_is_the_share_of_pairs_not_visited(state: SkipState) -> None:
    bits = unpack_bits(state.mask, state.blocks)
    expected = 1.0 - bits.double().mean().item() if bits.numel() else 0.0
    assert state.sparsity() == pytest.approx(expected)
    for slot in range(len(bits)):
        expected = 1.0 - bits[slot].double().mean().item() if bits[slot].numel() else 0.0
        assert state.sparsity(slot) == pytest.approx(expected)


def test_fresh_state_visits_everything() -> None:
    state = SkipState(2, 3, 130, 100)
    assert state.to_ranges() == [[[[(0, 100)]] * 2] * 3] * 2
    assert state.sparsity() == 0.0
    assert state.lse is None
    assert state.mask.dtype == torch.int32
    assert state.mask.shape == (2, 3, 2, 1)


def test_ranges_name_visited_tokens() -> None:
    state = SkipState(1, 1, 1, 300)
    state.mask.fill_(0b10011)
    assert state.to_ranges() == [[[[(0, 128), (256, 300)]]]]
    assert state.sparsity() == pytest.approx(2 / 5)


def test_from_ranges_visits_blocks_that_overlap() -> None:
    state = SkipState.from_ranges([[[[(70, 71), (255, 257)]]]], 1, 300)
    assert state.to_ranges() == [[[[(64, 128), (192, 300)]]]]


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([[[[(0, 301)]]]], "ranges: expected 0 <= start < end <= 300 tokens"),
        ([[[[], []]]], "ranges: expected 1 tiles in slot 0, head 0, got 2"),
        ([[[[]]], [[[]], [[]]]], "ranges: expected 1 heads in slot 1, got 2"),
    ],
)
def test_from_ranges_refuses_what_does_not_fit(ranges: list[list[list[list[tuple[int, int]]]]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SkipState.from_ranges(ranges, 100, 300)


def test_memory_of_a_video_layer() -> None:
    state = SkipState(1, 40, 75_600, 75_600)
    assert state.memory_bytes() == 40 * ceil_div(75_600, TILE_Q) * 37 * 4
    assert 3.4e6 < state.memory_bytes() < 3.6e6
    for rule in ALL_RULES[1:]:
        with_lse = SkipState(1, 40, 75_600, 75_600, rule=rule)
        assert with_lse.memory_bytes() == state.memory_bytes() + 40 * 75_600 * 4


@pytest.mark.parametrize("slots", [1, [1], torch.tensor([1])])
def test_reset_by_slot(slots: int | list[int] | torch.Tensor) -> None:
    state = SkipState(3, 2, 10, 100, rule="mass")
    assert state.lse is not None
    state.mask.zero_()
    state.lse.zero_()
    state.reset(slots)
    assert [state.sparsity(slot) for slot in range(3)] == [1.0, 0.0, 1.0]
    assert state.lse.isinf().all(dim=2).all(dim=1).tolist() == [False, True, False]
    state.reset()
    assert state.sparsity() == 0.0
    assert (state.lse == torch.inf).all()


def test_reset_and_refresh_keep_the_address() -> None:
    """CUDA graphs replay on the same memory."""
    state = SkipState(1, 1, 10, 2000, rule="mass")
    assert state.lse is not None
    address = state.mask.data_ptr()
    state.mask.zero_()
    state.lse.zero_()
    state.refresh()
    assert state.sparsity() == 0.0
    assert not state.lse.any(), "a refresh keeps the log-sum-exp"
    state.reset()
    assert state.mask.data_ptr() == address


def test_unknown_rule() -> None:
    with pytest.raises(ValueError, match="rule: expected"):
        SkipState(1, 1, 1, 1, rule="max")  # type: ignore[arg-type]
