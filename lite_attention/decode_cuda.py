"""`lite_attention::decode` and `summarize` on Hopper GPUs: prepares memory for the kernels of ``csrc/sm90/decode``."""

import torch
from torch import Tensor

from lite_attention.native import cuda
from lite_attention.native.cuda import DTYPES, MAX_HEAD_DIM

MAX_GROUP = 16
MAX_ROWS = 1024


def check_supported(dtype: torch.dtype, head_dim: int, group: int, device: torch.device) -> None:
    """Check that the kernels take queries of that type and head_dim, ``group`` query heads a key head, on that device.

    Raises:
        TypeError: the type is neither bfloat16 nor float16.
        ValueError: head_dim is no multiple of 16 up to 256, or the group is larger than 16.
        RuntimeError: the kernels are not built or not for this GPU.
    """
    if dtype not in DTYPES:
        raise TypeError(f"query: expected bfloat16 or float16 on {device.type}, got {dtype}")
    if head_dim % 16 or not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"query: expected head_dim a multiple of 16 up to {MAX_HEAD_DIM}, got {head_dim}")
    if group > MAX_GROUP:
        raise ValueError(f"query: expected at most {MAX_GROUP} query heads a key head, got {group}")
    if reason := cuda.obstacle(device.index):
        raise RuntimeError(f"lite_attention::decode cannot run on {device}: {reason}")


def summarize(key_cache: Tensor, slot_mapping: Tensor, summaries: Tensor) -> None:
    """Arguments and meaning as `lite_attention.reference.summarize`; bfloat16 and float16.

    Launches on the current stream, never waits or allocates.

    Raises:
        TypeError, ValueError, RuntimeError: as `check_supported` says.
        ValueError: keys whose last dimension is not contiguous, or summaries that are not aligned to 16 bytes.
    """
    check_supported(key_cache.dtype, key_cache.shape[3], 1, key_cache.device)
    _check_aligned("key_cache", key_cache)
    _check_summaries(summaries)
    torch.ops.lite_attention.summarize_sm90(key_cache, slot_mapping.contiguous(), summaries)


def workspace_bytes(rows: int, heads: int, kv_heads: int, head_dim: int, max_tokens: int) -> int:
    """Bytes of the workspace of calls with up to so many rows, of this rank's heads.

    ``max_tokens``: what a row of the block table has room for.
    """
    return cuda.decode_workspace_bytes(rows, heads, kv_heads, head_dim, max_tokens)


def decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    summaries: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    slots: Tensor,
    thresholds: Tensor,
    visit_all: Tensor,
    mask: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments, results and meaning as `lite_attention.reference.decode`; bfloat16 and float16.

    Which blocks are visited is what the reference decides within rounding: of estimates, 0.01 log2 units.

    Launches on the current stream and never waits. Allocates the results and a workspace (`decode_into` does not).

    Raises:
        TypeError, ValueError, RuntimeError: as `decode_into` says.
    """
    rows, heads, head_dim = query.shape
    kv_heads = key_cache.shape[2]
    check_supported(query.dtype, head_dim, heads // kv_heads, query.device)
    if not cuda.is_aligned(query):
        query = query.clone(memory_format=torch.contiguous_format)
    max_tokens = block_table.shape[1] * key_cache.shape[1]
    size = workspace_bytes(rows, heads, kv_heads, head_dim, max_tokens)
    workspace = torch.empty(size, dtype=torch.uint8, device=query.device)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(rows, heads, dtype=torch.float32, device=query.device)
    visited = torch.zeros(rows, dtype=torch.int32, device=query.device)
    seq_lens, slots, thresholds, visit_all = (
        tensor.contiguous() for tensor in (seq_lens, slots, thresholds, visit_all)
    )
    decode_into(
        out,
        lse,
        visited,
        query,
        key_cache,
        value_cache,
        summaries,
        block_table,
        seq_lens,
        slots,
        thresholds,
        visit_all,
        mask,
        scale,
        workspace,
    )
    return out, lse, visited


def decode_into(
    out: Tensor,
    lse: Tensor,
    visited: Tensor,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    summaries: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    slots: Tensor,
    thresholds: Tensor,
    visit_all: Tensor,
    mask: Tensor,
    scale: float,
    workspace: Tensor,
) -> None:
    """As `decode`, into memory that is there: for engines, whose graphs replay at fixed addresses.

    Shapes and types are those of the reference and are not checked again; tensors (rows,) are contiguous.

    Args:
        out: (rows, heads, head_dim), written; type of the query, last dimension contiguous.
        lse: (rows, heads) float32 contiguous, written.
        visited: (rows,) int32, added to.
        workspace: uint8, at least `workspace_bytes`, whatever is in it. Calls that follow one another can share it.

    Raises:
        TypeError, ValueError, RuntimeError: as `check_supported` says.
        ValueError: more than 1,024 rows; a tensor that the copy engine cannot read, with a last dimension that is not
            contiguous, or data or strides off 16 bytes; summaries off 16 bytes; a workspace that is too small.
        RuntimeError: the launch fails.
    """
    rows, heads, head_dim = query.shape
    kv_heads = key_cache.shape[2]
    check_supported(query.dtype, head_dim, heads // kv_heads, query.device)
    if rows > MAX_ROWS:
        raise ValueError(f"query: expected at most {MAX_ROWS} rows, got {rows}")
    for name, tensor in (("query", query), ("key_cache", key_cache), ("value_cache", value_cache)):
        _check_aligned(name, tensor)
    _check_summaries(summaries)
    needed = workspace_bytes(rows, heads, kv_heads, head_dim, block_table.shape[1] * key_cache.shape[1])
    if workspace.nbytes < needed:
        raise ValueError(f"workspace: expected at least {needed} bytes, got {workspace.nbytes}")
    torch.ops.lite_attention.decode_sm90(
        query,
        key_cache,
        value_cache,
        summaries,
        block_table,
        seq_lens,
        slots,
        thresholds,
        visit_all,
        mask,
        out,
        lse,
        visited,
        workspace,
        scale,
    )


def _check_aligned(name: str, tensor: Tensor) -> None:
    if not cuda.is_aligned(tensor):
        raise ValueError(
            f"{name}: expected 16-byte aligned rows on {tensor.device.type}, got strides {tensor.stride()}"
        )


def _check_summaries(summaries: Tensor) -> None:
    if summaries.data_ptr() % 16 or any(stride % 16 for stride in summaries.stride()[:3]):
        raise ValueError(f"summaries: expected rows aligned to 16 bytes, got strides {summaries.stride()}")
