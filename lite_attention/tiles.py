"""Grain of skipping: the sizes that every implementation shares."""

TILE_Q = 128
"""Consecutive queries of one head that share a row of the skip mask (`forward`)."""

BLOCK_K = 64
"""Consecutive keys that are skipped together (`forward`)."""

DECODE_BLOCK = 16
"""Consecutive keys of the paged cache that are scored and skipped together (`decode`)."""

WORD_BITS = 32
"""Blocks packed into one int32 word of a skip mask."""


def ceil_div(numerator: int, denominator: int) -> int:
    """Smallest integer that is at least ``numerator / denominator``."""
    return -(-numerator // denominator)


def mask_words(blocks: int) -> int:
    """Number of int32 words that hold one bit for each of ``blocks`` blocks."""
    return ceil_div(blocks, WORD_BITS)


def summary_bytes(head_dim: int) -> int:
    """Bytes of the summary of a block and KV head: see `lite_attention.reference.summarize`."""
    return 2 * head_dim + 16
