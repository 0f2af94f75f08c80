"""The compiled CUDA kernels (``csrc/sm90``), which PyTorch loads as operators of its own.

Nothing is loaded, and no driver is touched, before a CUDA tensor asks for it.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lite_attention.tiles import BLOCK_K, DECODE_BLOCK, TILE_Q

LIBRARY = Path(__file__).parent / "liblite_attention_cuda.so"

CAPABILITY = (9, 0)
"""The compute capability, Hopper's, that the kernels are compiled for; they run on no other."""

DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256

ALIGNMENT = 8
"""Elements, 16 bytes: the copy engine takes head_dim and strides in multiples of it, from addresses on it."""

NOT_BUILT = "not built: at installation there was no CUDA compiler (nvcc), or it failed"


def is_aligned(tensor: Tensor) -> bool:
    """Whether the copy engine can read a tensor of 16-bit floats as it is."""
    aligned = tensor.data_ptr() % (ALIGNMENT * tensor.element_size()) == 0 and tensor.stride(-1) == 1
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        aligned = aligned and (size < 2 or (stride > 0 and stride % ALIGNMENT == 0))
    return aligned


@cache
def obstacle(device: int) -> str | None:
    """Load the kernels for the CUDA device of that index; None, or what keeps them from running there."""
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability != CAPABILITY:
        found = "this GPU is sm_{}{}".format(*capability)
        return f"{found} ({torch.cuda.get_device_name(device)}): the kernels need sm_90 (Hopper)"
    return _load()


@cache
def _load() -> str | None:
    if not LIBRARY.exists():
        return NOT_BUILT
    try:
        torch.ops.load_library(LIBRARY)
        return tile_mismatch(_library())
    except (OSError, AttributeError) as error:
        return f"cannot be loaded: {error}"


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(LIBRARY))
    library.lite_attention_decode_workspace_bytes.argtypes = [ctypes.c_int] * 4 + [ctypes.c_int64]
    library.lite_attention_decode_workspace_bytes.restype = ctypes.c_int64
    return library


def tile_mismatch(library: ctypes.CDLL) -> str | None:
    """None, or in which way the sizes that a library was built for are not those of `lite_attention.tiles`."""
    sizes = tuple(ctypes.c_int() for _ in range(3))
    library.lite_attention_tile_sizes(*map(ctypes.byref, sizes))
    tile_q, block_k, decode_block = (size.value for size in sizes)
    if (tile_q, block_k, decode_block) == (TILE_Q, BLOCK_K, DECODE_BLOCK):
        return None
    built = f"built for tiles of {tile_q} queries and {block_k} keys, and decode blocks of {decode_block}"
    return f"{built}, expected {TILE_Q}, {BLOCK_K} and {DECODE_BLOCK}: install the package again"


def decode_workspace_bytes(rows: int, heads: int, kv_heads: int, head_dim: int, max_tokens: int) -> int:
    """Bytes that the decode kernel works in; the kernels are there (`obstacle` is None).

    ``max_tokens``: what a row of the block table has room for.
    """
    return int(_library().lite_attention_decode_workspace_bytes(rows, heads, kv_heads, head_dim, max_tokens))


def status() -> tuple[bool, str]:
    """Whether the kernels run on PyTorch's current CUDA device; whether they are built, and what keeps them."""
    device = torch.cuda.current_device() if torch.cuda.is_available() else 0
    reason = obstacle(device)
    if reason is None:
        return True, f"built; run on {torch.cuda.get_device_name(device)}"
    if reason == NOT_BUILT:
        return False, reason
    return False, f"{'built' if LIBRARY.exists() else 'not built'}; {reason}"
