"""Sets of key blocks as bits packed into int32 words, and as token ranges.

Bit ``i`` of word ``w`` stands for block ``w * WORD_BITS + i``; bits past the last block are 0. Token ranges
are half-open, ``(start, end)``, in natural order.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from operator import index

import torch
from torch import Tensor
from torch.nn.functional import pad

from lite_attention.tiles import BLOCK_K, WORD_BITS, ceil_div, mask_words

Range = tuple[int, int]


def pack_bits(bits: Tensor) -> Tensor:
    """Pack ``bits``, bool (..., blocks), into int32 (..., mask_words(blocks))."""
    words = mask_words(bits.shape[-1])
    padded = pad(bits.long(), (0, words * WORD_BITS - bits.shape[-1]))
    positions = torch.arange(WORD_BITS, device=bits.device)
    packed = (padded.unflatten(-1, (words, WORD_BITS)) << positions).sum(-1)
    return torch.where(packed < 2**31, packed, packed - 2**32).to(torch.int32)


def unpack_bits(words: Tensor, blocks: int) -> Tensor:
    """Unpack ``words``, int32 (..., mask_words(blocks)), into bool (..., blocks)."""
    positions = torch.arange(WORD_BITS, dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> positions) & 1).flatten(-2)[..., :blocks].bool()


def count_bits(words: Tensor) -> Tensor:
    """Number of bits that are 1 in each row of ``words``: int32 (..., words) to int64 (...)."""
    return unpack_bits(words, words.shape[-1] * WORD_BITS).sum(-1)


def all_blocks(blocks: int, device: torch.device | str | None = None) -> Tensor:
    """Words, int32 (mask_words(blocks),), with a 1 for each of ``blocks`` blocks."""
    return pack_bits(torch.ones(blocks, dtype=torch.bool, device=device))


def check_ranges(ranges: Iterable[Sequence[int]], tokens: int, name: str) -> list[Range]:
    """Return ``ranges`` of a sequence of ``tokens`` sorted, with those that overlap or touch joined.

    Raises:
        TypeError: a range is not a pair of ints.
        ValueError: a range is empty or reaches past the sequence.
    """
    joined: list[Range] = []
    for start, end in sorted(_pair(item, name) for item in ranges):
        if not 0 <= start < end <= tokens:
            raise ValueError(f"{name}: expected 0 <= start < end <= {tokens} tokens, got ({start}, {end})")
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def from_flat_list(flat: Sequence[int], tokens: int, name: str) -> list[Range]:
    """Token ranges of a flat list in either of the published formats.

    Descending, ``[80, 60, 45, 40]``: tokens 40 to 45 and 60 to 80; a list that starts at ``tokens - 1`` means
    the sequence to its end. Ascending, ``[40, 45, 60, 80]``: the same ranges.

    Raises:
        TypeError: an element is not an int.
        ValueError: the order is neither, the length is odd or an element lies outside 0 to ``tokens``.
    """
    numbers = [_integer(item, name) for item in flat]
    if len(numbers) % 2:
        raise ValueError(f"{name}: expected pairs of start and end, got {len(numbers)} numbers")
    descending = all(left > right for left, right in pairwise(numbers))
    if not descending and not all(left < right for left, right in pairwise(numbers)):
        raise ValueError(f"{name}: expected strictly descending or strictly ascending tokens, got {numbers}")
    if numbers and descending:
        if numbers[0] == tokens - 1:
            numbers[0] = tokens
        numbers.reverse()
    return check_ranges(zip(numbers[::2], numbers[1::2], strict=True), tokens, name)


def forced_words(
    must_visit: list[Range], must_skip: list[Range], tokens: int, device: torch.device | str | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Words, int32 (words,), of the blocks always and of the blocks never visited; None where no range asks.

    A block that overlaps ``must_visit`` is always visited; one wholly inside ``must_skip`` never.
    Both are results of `check_ranges`.

    Raises:
        ValueError: the two overlap, or ``must_skip`` leaves nothing to visit.
    """
    if must_skip == [(0, tokens)]:
        raise ValueError(f"must_skip: expected some of {tokens} tokens left to visit, got a range over all of them")
    for start, end in must_visit:
        for skip_start, skip_end in must_skip:
            if start < skip_end and skip_start < end:
                raise ValueError(
                    f"must_skip: expected no overlap with must_visit, got ({skip_start}, {skip_end}) "
                    f"and ({start}, {end})"
                )
    visit = touched_blocks(must_visit, tokens)
    skip = _enclosed_blocks(must_skip, tokens)
    return (
        pack_bits(visit).to(device) if must_visit else None,
        pack_bits(skip).to(device) if must_skip else None,
    )


def touched_blocks(ranges: Iterable[Range], tokens: int) -> Tensor:
    """Blocks that overlap one of ``ranges``: bool (blocks,)."""
    bits = torch.zeros(ceil_div(tokens, BLOCK_K), dtype=torch.bool, device="cpu")
    for start, end in ranges:
        bits[start // BLOCK_K : ceil_div(end, BLOCK_K)] = True
    return bits


def block_ranges(bits: Sequence[bool], tokens: int) -> list[Range]:
    """Token ranges of the blocks that are set, adjacent ones joined, the last clipped to ``tokens``."""
    blocks = [(block * BLOCK_K, (block + 1) * BLOCK_K) for block, bit in enumerate(bits) if bit]
    return check_ranges([(start, min(end, tokens)) for start, end in blocks], tokens, "bits")


def _enclosed_blocks(ranges: list[Range], tokens: int) -> Tensor:
    bits = torch.zeros(ceil_div(tokens, BLOCK_K), dtype=torch.bool, device="cpu")
    for start, end in ranges:
        last = len(bits) if end == tokens else end // BLOCK_K
        bits[ceil_div(start, BLOCK_K) : last] = True
    return bits


def _pair(item: Sequence[int], name: str) -> Range:
    if not isinstance(item, Sequence) or isinstance(item, str) or len(item) != 2:
        raise TypeError(f"{name}: expected ranges (start, end), got {item!r}")
    return _integer(item[0], name), _integer(item[1], name)


def _integer(item: object, name: str) -> int:
    if isinstance(item, bool):
        raise TypeError(f"{name}: expected an int, got bool {item!r}")
    try:
        return index(item)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}: expected an int, got {type(item).__name__} {item!r}") from None
