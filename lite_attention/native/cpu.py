"""The compiled CPU kernels (``csrc/cpu``), reached through a plain C interface.

The library is optional: without it the operators run their reference implementation.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lite_attention.tiles import DECODE_BLOCK

LIBRARY = Path(__file__).parent / "liblite_attention_cpu.so"

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Cache dtypes that the kernels read, with their numbers in ``csrc/cpu/params.h``."""

_pointer, _i64, _i32, _f32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class _KeyCache(ctypes.Structure):
    _fields_ = [("data", _pointer), ("page", _i64), ("token", _i64), ("head", _i64), ("dim", _i64)]


class _Summaries(ctypes.Structure):
    _fields_ = [("data", _pointer), ("page", _i64), ("head", _i64), ("block", _i64)]


class _DecodeParams(ctypes.Structure):
    _fields_ = [
        ("query", _pointer),
        ("query_row", _i64),
        ("query_head", _i64),
        ("key", _KeyCache),
        ("value", _pointer),
        ("value_page", _i64),
        ("value_token", _i64),
        ("value_head", _i64),
        ("summaries", _Summaries),
        ("block_table", _pointer),
        ("block_table_row", _i64),
        ("seq_lens", _pointer),
        ("slots", _pointer),
        ("thresholds", _pointer),
        ("visit_all", _pointer),
        ("mask", _pointer),
        ("mask_slot", _i64),
        ("mask_head", _i64),
        ("out", _pointer),
        ("lse", _pointer),
        ("visited", _pointer),
        ("rows", _i32),
        ("heads", _i32),
        ("kv_heads", _i32),
        ("head_dim", _i32),
        ("page_size", _i32),
        ("dtype", _i32),
        ("scale", _f32),
    ]


class _SummarizeParams(ctypes.Structure):
    _fields_ = [
        ("key", _KeyCache),
        ("summaries", _Summaries),
        ("slot_mapping", _pointer),
        ("tokens", _i64),
        ("kv_heads", _i32),
        ("head_dim", _i32),
        ("page_size", _i32),
        ("dtype", _i32),
    ]


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    if not LIBRARY.exists():
        return None, "not built: no C++ compiler was found at installation"
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return None, f"cannot be loaded: {error}"
    library.lite_attention_isa.restype = ctypes.c_char_p
    isa = library.lite_attention_isa().decode()
    if not isa:
        return None, "this CPU lacks AVX2 (x86-64-v3)"
    if (block := library.lite_attention_decode_block()) != DECODE_BLOCK:
        return None, f"built for blocks of {block} keys, expected {DECODE_BLOCK}: install the package again"
    library.lite_attention_decode.argtypes = [ctypes.POINTER(_DecodeParams)]
    library.lite_attention_summarize.argtypes = [ctypes.POINTER(_SummarizeParams)]
    return library, isa


def status() -> tuple[bool, str]:
    """Whether the compiled kernels can run, and their instruction set or what keeps them from running."""
    library, detail = _load()
    return library is not None, detail


def supports_keys(cache: Tensor) -> bool:
    """Whether the kernels read keys (pages, page_size, kv_heads, head_dim) of this size and layout."""
    contiguous = cache.stride(3) == 1 or cache.stride(1) == 1
    return _load()[0] is not None and cache.shape[3] % 16 == 0 and contiguous


def supports_values(cache: Tensor) -> bool:
    """Whether the kernels read values (pages, page_size, kv_heads, head_dim) of this layout."""
    return cache.stride(3) == 1


def _key_cache(cache: Tensor) -> _KeyCache:
    return _KeyCache(cache.data_ptr(), *cache.stride())


def _summaries(summaries: Tensor) -> _Summaries:
    return _Summaries(summaries.data_ptr(), *summaries.stride()[:3])


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
    """``reference.decode`` by the compiled kernels; arguments are checked by the caller."""
    rows, heads, head_dim = query.shape
    if query.stride(2) != 1:
        query = query.contiguous()
    out = torch.empty(rows, heads, head_dim, dtype=query.dtype)
    lse = torch.empty(rows, heads, dtype=torch.float32)
    visited = torch.empty(rows, dtype=torch.int32)
    params = _DecodeParams(
        query=query.data_ptr(),
        query_row=query.stride(0),
        query_head=query.stride(1),
        key=_key_cache(key_cache),
        value=value_cache.data_ptr(),
        value_page=value_cache.stride(0),
        value_token=value_cache.stride(1),
        value_head=value_cache.stride(2),
        summaries=_summaries(summaries),
        block_table=block_table.data_ptr(),
        block_table_row=block_table.stride(0),
        seq_lens=seq_lens.data_ptr(),
        slots=slots.data_ptr(),
        thresholds=thresholds.data_ptr(),
        visit_all=visit_all.data_ptr(),
        mask=mask.data_ptr(),
        mask_slot=mask.stride(0),
        mask_head=mask.stride(1),
        out=out.data_ptr(),
        lse=lse.data_ptr(),
        visited=visited.data_ptr(),
        rows=rows,
        heads=heads,
        kv_heads=key_cache.shape[2],
        head_dim=head_dim,
        page_size=key_cache.shape[1],
        dtype=DTYPES[key_cache.dtype],
        scale=scale,
    )
    library = _load()[0]
    assert library is not None
    library.lite_attention_decode(ctypes.byref(params))
    return out, lse, visited


def summarize(key_cache: Tensor, slot_mapping: Tensor, summaries: Tensor) -> None:
    """``reference.summarize`` by the compiled kernels; arguments are checked by the caller."""
    params = _SummarizeParams(
        key=_key_cache(key_cache),
        summaries=_summaries(summaries),
        slot_mapping=slot_mapping.data_ptr(),
        tokens=slot_mapping.numel(),
        kv_heads=key_cache.shape[2],
        head_dim=key_cache.shape[3],
        page_size=key_cache.shape[1],
        dtype=DTYPES[key_cache.dtype],
    )
    library = _load()[0]
    assert library is not None
    library.lite_attention_summarize(ctypes.byref(params))
