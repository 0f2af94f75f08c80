"""What stands between PyTorch and the CUDA kernels, as far as it shows without a GPU."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lite_attention import forward_cuda, ops
from lite_attention.native import cuda
from lite_attention.tiles import BLOCK_K, DECODE_BLOCK, TILE_Q

ROOT = Path(__file__).parents[2]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said without a GPU")


@pytest.fixture(scope="module")
def build_cuda() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_cuda", ROOT / "csrc" / "build_cuda.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def on_cuda(head_dim: int, dtype: torch.dtype) -> Tensor:
    with FakeTensorMode():
        return torch.empty(1, 200, 2, head_dim, dtype=dtype, device="cuda:0")


@pytest.mark.parametrize(
    ("head_dim", "dtype", "error", "message"),
    [
        (64, torch.float32, TypeError, "query: expected bfloat16 or float16 on cuda, got torch.float32"),
        (264, torch.bfloat16, ValueError, "query: expected head_dim from 1 to 256 on cuda, got 264"),
        (0, torch.float16, ValueError, "query: expected head_dim from 1 to 256 on cuda, got 0"),
    ],
)
def test_what_no_kernel_takes(head_dim: int, dtype: torch.dtype, error: type[Exception], message: str) -> None:
    query = on_cuda(head_dim, dtype)
    assert ops.unsupported("forward", query) == message
    with pytest.raises(error, match=message):
        forward_cuda.check_supported(query)


@no_gpu
def test_without_a_gpu() -> None:
    query = on_cuda(64, torch.bfloat16)
    message = "lite_attention::forward cannot run on cuda:0: PyTorch sees no CUDA device"
    assert ops.unsupported("forward", query) == message
    with pytest.raises(RuntimeError, match=message):
        forward_cuda.check_supported(query)
    built = "built" if cuda.LIBRARY.exists() else "not built"
    assert cuda.status() == (False, f"{built}; PyTorch sees no CUDA device")


def layouts() -> dict[str, Tensor]:
    """Keys (2, tokens, heads, head_dim); from "odd address" on, by what the copy engine cannot read in them."""
    whole = torch.randn(2 * 6 * 3 * 64 + 8, dtype=torch.bfloat16)
    keys = whole[: 2 * 6 * 3 * 64].view(2, 6, 3, 64)
    return {
        "contiguous": keys,
        "a head of a fused projection": torch.randn(2, 6, 9, 64, dtype=torch.bfloat16)[:, :, 3:6],
        "heads before tokens": torch.randn(2, 3, 6, 64, dtype=torch.bfloat16).transpose(1, 2),
        "no tokens": keys[:, :0],
        "one head with an odd stride": torch.randn(2, 6, 1, 72, dtype=torch.bfloat16)[..., :64].as_strided(
            (2, 6, 1, 64), (432, 72, 1, 1)
        ),
        "odd address": whole[1 : 2 * 6 * 3 * 64 + 1].view(2, 6, 3, 64),
        "odd stride": torch.randn(2, 6, 3, 68, dtype=torch.bfloat16)[..., :64],
        "expanded": keys[:, :, :1].expand(2, 6, 3, 64),
        "last dimension": torch.randn(2, 6, 64, 3, dtype=torch.bfloat16).transpose(2, 3),
        "channels last": torch.randn(2, 3, 60, 6, dtype=torch.bfloat16).permute(0, 3, 1, 2),
        "head_dim": keys[..., :20],
    }


@pytest.mark.parametrize("layout", layouts())
def test_the_copy_engine_gets_what_it_can_read(layout: str) -> None:
    tensor = layouts()[layout]
    readable = forward_cuda._readable(tensor)
    head_dim = tensor.shape[3]
    assert readable.shape == (*tensor.shape[:3], -(-head_dim // 8) * 8)
    assert readable.stride(3) == 1 and readable.data_ptr() % 16 == 0
    strides = [stride for size, stride in zip(readable.shape, readable.stride(), strict=True) if size > 1]
    assert all(stride > 0 and stride % 8 == 0 for stride in strides[:-1])
    assert torch.equal(readable[..., :head_dim], tensor) and not readable[..., head_dim:].any()
    order = list(layouts())
    assert (readable is tensor) == (order.index(layout) < order.index("odd address"))


@pytest.fixture
def library_of(tmp_path: Path) -> Callable[[int, int], ctypes.CDLL]:
    """Makes a library that says it was built for these tiles."""

    def make(tile_q: int, block_k: int) -> ctypes.CDLL:
        source = tmp_path / "tiles.c"
        sizes = f"*q = {tile_q}; *k = {block_k}; *decode = {DECODE_BLOCK};"
        source.write_text(f"void lite_attention_tile_sizes(int* q, int* k, int* decode) {{ {sizes} }}")
        subprocess.run(["cc", "-shared", "-fPIC", source, "-o", tmp_path / "tiles.so"], check=True)
        return ctypes.CDLL(str(tmp_path / "tiles.so"))

    return make


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize(("tile_q", "block_k"), [(TILE_Q, BLOCK_K), (TILE_Q, 2 * BLOCK_K), (64, BLOCK_K)])
def test_tiles_must_agree(tile_q: int, block_k: int, library_of: Callable[[int, int], ctypes.CDLL]) -> None:
    mismatch = cuda.tile_mismatch(library_of(tile_q, block_k))
    if (tile_q, block_k) == (TILE_Q, BLOCK_K):
        assert mismatch is None
    else:
        assert mismatch is not None
        assert f"built for tiles of {tile_q} queries and {block_k} keys, and decode blocks of 16" in mismatch


@pytest.mark.skipif(not cuda.LIBRARY.exists(), reason="the CUDA kernels are not built")
def test_the_built_library_registers_its_operators() -> None:
    # Loaded lazily: what asks for the current stream is in the CUDA builds of PyTorch only.
    loader = ctypes.CDLL(None)
    loader.dlopen.argtypes, loader.dlopen.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.c_void_p
    handle = loader.dlopen(str(cuda.LIBRARY).encode(), os.RTLD_LAZY)
    assert handle
    assert cuda.tile_mismatch(ctypes.CDLL(str(cuda.LIBRARY), handle=handle)) is None
    for operator, written in (
        ("forward_sm90", ["out", "lse", "schedule", "mask", "lse_state", "visited", "summaries", "skipped"]),
        ("summarize_blocks_sm90", ["summaries"]),
        ("decode_sm90", ["mask", "out", "lse", "visited", "workspace"]),
        ("summarize_sm90", ["summaries"]),
    ):
        arguments = getattr(torch.ops.lite_attention, operator).default._schema.arguments
        assert [a.name for a in arguments if a.alias_info and a.alias_info.is_write] == written


def test_plan_of_the_build(build_cuda: ModuleType) -> None:
    units = list(build_cuda.units())
    kernels = 2 * len(build_cuda.FORWARD_HEAD_DIMS) + 2 * len(build_cuda.DECODE_HEAD_DIMS)
    assert len({name for name, _, _ in units}) == len(units) == kernels + 6
    assert all((ROOT / "csrc" / source).exists() for _, source, _ in units)
    text = build_cuda.plan("library.so", Path("/a b/nvcc"), Path("/py/$torch"), Path("/cutlass"))
    assert "nvcc = '/a b/nvcc'\n" in text and "torch = '/py/$$torch'\n" in text
    links = [line for line in text.splitlines() if line.startswith("build library.so: link ")]
    assert len(links) == 1 and links[0].split()[3:] == [name for name, _, _ in units]


def test_build_says_what_is_missing(build_cuda: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nvcc: expected it in CUDA_HOME/bin"):
        build_cuda.build(tmp_path / "library.so", tmp_path)
    monkeypatch.setenv("CUTLASS_INCLUDE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="CUTLASS_INCLUDE: expected a folder that has cute/"):
        build_cuda._cutlass(tmp_path)
