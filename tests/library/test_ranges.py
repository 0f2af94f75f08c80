"""Bits, words and token ranges."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lite_attention.ranges import (
    Range,
    all_blocks,
    block_ranges,
    check_ranges,
    count_bits,
    forced_words,
    from_flat_list,
    pack_bits,
    touched_blocks,
    unpack_bits,
)
from lite_attention.tiles import BLOCK_K, mask_words

BITS = st.lists(st.booleans(), max_size=100)


@given(BITS)
def test_bits_survive_packing(bits: list[bool]) -> None:
    words = pack_bits(torch.tensor(bits, dtype=torch.bool))
    assert words.dtype == torch.int32
    assert words.shape == (mask_words(len(bits)),)
    assert unpack_bits(words, len(bits)).tolist() == bits
    assert count_bits(words).item() == sum(bits)


def test_order_of_bits() -> None:
    assert all_blocks(33).tolist() == [-1, 1]
    assert pack_bits(torch.arange(32) == 31).tolist() == [-(2**31)]
    assert unpack_bits(torch.tensor([[1, 0], [0, 2]], dtype=torch.int32), 34).nonzero().tolist() == [
        [0, 0],
        [1, 33],
    ]


@given(BITS, st.integers(1, BLOCK_K))
def test_blocks_survive_as_ranges(bits: list[bool], last: int) -> None:
    tokens = max(len(bits) - 1, 0) * BLOCK_K + (last if bits else 0)
    ranges = block_ranges(bits, tokens)
    assert touched_blocks(ranges, tokens).tolist() == bits
    assert all(left[1] < right[0] for left, right in itertools.pairwise(ranges))
    assert not ranges or ranges[-1][1] <= tokens


def test_ranges_are_sorted_and_joined() -> None:
    assert check_ranges([(50, 60), (0, 10), (10, 20), (15, 18)], 100, "must_visit") == [(0, 20), (50, 60)]


@pytest.mark.parametrize(
    ("ranges", "error", "message"),
    [
        ([(0, 101)], ValueError, r"must_visit: expected 0 <= start < end <= 100 tokens, got \(0, 101\)"),
        ([(-1, 5)], ValueError, r"got \(-1, 5\)"),
        ([(5, 5)], ValueError, r"got \(5, 5\)"),
        ([(9, 5)], ValueError, r"got \(9, 5\)"),
        ([(0, 5.0)], TypeError, "must_visit: expected an int, got float 5.0"),
        ([(False, True)], TypeError, "must_visit: expected an int, got bool False"),
        ([(1, 2, 3)], TypeError, r"must_visit: expected ranges \(start, end\), got \(1, 2, 3\)"),
        ([3, 4], TypeError, r"must_visit: expected ranges \(start, end\), got 3"),
        (["ab"], TypeError, r"must_visit: expected ranges \(start, end\), got 'ab'"),
    ],
)
def test_bad_ranges_are_refused_by_name(ranges: list[Range], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_ranges(ranges, 100, "must_visit")


@pytest.mark.parametrize(
    ("flat", "expected"),
    [
        ([80, 60, 45, 40, 12, 2], [(2, 12), (40, 45), (60, 80)]),
        ([2, 12, 40, 45, 60, 80], [(2, 12), (40, 45), (60, 80)]),
        ([100, 0], [(0, 100)]),
        ([99, 0], [(0, 100)]),
        ([0, 100], [(0, 100)]),
        ([0, 99], [(0, 99)]),
        ([], []),
    ],
)
def test_published_flat_lists(flat: list[int], expected: list[Range]) -> None:
    assert from_flat_list(flat, 100, "must_do_list") == expected


@pytest.mark.parametrize(
    ("flat", "error", "message"),
    [
        ([80, 60, 70, 40], ValueError, "must_do_list: expected strictly descending or strictly ascending"),
        ([5, 5], ValueError, "must_do_list: expected strictly"),
        ([80, 60, 40], ValueError, "must_do_list: expected pairs of start and end, got 3 numbers"),
        ([101, 60], ValueError, "must_do_list: expected 0 <= start < end <= 100"),
        ([10.0, 5], TypeError, "must_do_list: expected an int, got float"),
    ],
)
def test_bad_flat_lists_are_refused_by_name(flat: list[int], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        from_flat_list(flat, 100, "must_do_list")


def bits_of(words: torch.Tensor | None, blocks: int) -> list[int]:
    assert words is not None
    return unpack_bits(words, blocks).nonzero().flatten().tolist()


def test_must_visit_takes_blocks_that_overlap_and_must_skip_blocks_wholly_inside() -> None:
    visit, skip = forced_words([(63, 65)], [(100, 250)], 260)
    assert bits_of(visit, 5) == [0, 1]
    assert bits_of(skip, 5) == [2]


def test_must_skip_takes_the_ragged_last_block() -> None:
    assert bits_of(forced_words([], [(190, 260)], 260)[1], 5) == [3, 4]
    assert bits_of(forced_words([], [(190, 259)], 260)[1], 5) == [3]


def test_must_skip_inside_one_block_takes_none() -> None:
    assert bits_of(forced_words([], [(10, 50)], 260)[1], 5) == []


def test_no_ranges_give_no_words() -> None:
    assert forced_words([], [], 260) == (None, None)


def test_contradictions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must_skip: expected no overlap with must_visit, got \(64, 200\)"):
        forced_words([(10, 20), (190, 210)], [(64, 200)], 260)
    with pytest.raises(ValueError, match="must_skip: expected some of 260 tokens left to visit"):
        forced_words([], [(0, 260)], 260)


def test_forced_ranges_that_touch_do_not_contradict() -> None:
    visit, skip = forced_words([(64, 128)], [(128, 192)], 260)
    assert (bits_of(visit, 5), bits_of(skip, 5)) == ([1], [2])
