"""Compiles csrc/sm90 and csrc/torch_library.cpp into one library: writes a plan for ninja, and runs it.

Of PyTorch only headers and the names of its libraries are used (its stable ABI), so the library depends on no Python
and serves every PyTorch from 2.11 on. `CUDA_HOME` says where nvcc is (else PATH), `CUTLASS_INCLUDE` which folder has
cute/ (else pip fetches it), `MAX_JOBS` how many compilers run at a time.
"""

from __future__ import annotations

import itertools
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
CUTLASS = "nvidia-cutlass==4.2.0.0"

FORWARD_HEAD_DIMS = (64, 96, 128, 192, 256)
DECODE_HEAD_DIMS = (64, 128, 192, 256)

FLAGS = "-std=c++17 -O3 -DNDEBUG -Xcompiler -fPIC,-fvisibility=hidden"
KERNEL_FLAGS = (
    "-gencode arch=compute_90a,code=sm_90a --expt-relaxed-constexpr --use_fast_math --ptxas-options=-v "
    "-diag-suppress 177"  # variables that only some of the kernels use
)
TORCH_FLAGS = "-DTORCH_TARGET_VERSION=0x020b000000000000"
LINK_FLAGS = "-shared -cudart static -Xlinker --no-as-needed -ltorch -ltorch_cpu -lc10"

# What a compiler prints stands in a log beside its object: the registers of the kernels. It is shown upon failure only.
RULES = f"""\
rule compile
  command = $nvcc {FLAGS} $flags -MD -MF $out.d -c $in -o $out > $out.log 2>&1 || (cat $out.log; exit 1)
  depfile = $out.d
  deps = gcc
  description = nvcc $out
rule link
  command = $nvcc {LINK_FLAGS} -L$torch/lib $in -o $out
  description = link $out
"""


def nvcc() -> Path | None:
    """The CUDA compiler, or None where there is none."""
    found = shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '')}/bin") or shutil.which("nvcc")
    return Path(found) if found else None


def requirements() -> list[str]:
    """What is missing here for a build, as pip is to be told: in an environment of pip's own, all of it."""
    missing = []
    if find_spec("torch") is None:
        missing.append("torch>=2.11")
    if _ninja() is None:
        missing.append("ninja")
    if not os.environ.get("CUTLASS_INCLUDE") and find_spec("pip") is None:
        missing.append("pip")
    return missing


def units() -> Iterator[tuple[str, str, str]]:
    """Object, source and flags of every unit; the kernels are several, which compile side by side."""
    for operator, head_dims in (("forward", FORWARD_HEAD_DIMS), ("decode", DECODE_HEAD_DIMS)):
        for head_dim, bfloat16 in itertools.product(head_dims, (0, 1)):
            name = f"{operator}_{head_dim}_{'bfloat16' if bfloat16 else 'float16'}.o"
            defines = f"-DLITE_HEAD_DIM={head_dim} -DLITE_BFLOAT16={bfloat16}"
            yield name, f"sm90/{operator}/{operator}.cu", f"{KERNEL_FLAGS} {defines} -I$cutlass"
        yield f"{operator}_dispatch.o", f"sm90/{operator}/dispatch.cpp", ""
    yield "order.o", "sm90/forward/order.cu", f"{KERNEL_FLAGS} -I$cutlass"
    yield "summarize_blocks.o", "sm90/forward/summarize_blocks.cu", f"{KERNEL_FLAGS} -I$cutlass"
    yield "summarize.o", "sm90/decode/summarize.cu", KERNEL_FLAGS
    yield "torch_library.o", "torch_library.cpp", f"{TORCH_FLAGS} -isystem $torch/include"


def plan(library: str, compiler: Path, torch: Path, cutlass: Path) -> str:
    """The text of build.ninja, which makes ``library``.

    Args:
        library: name of the library, in the folder in which ninja runs.
        compiler: nvcc.
        torch: folder of the package, with include/ and lib/.
        cutlass: folder with cute/.
    """
    paths = {"nvcc": compiler, "torch": torch, "cutlass": cutlass}
    lines = [f"{name} = {shlex.quote(str(path)).replace('$', '$$')}" for name, path in paths.items()]
    lines.append(RULES)
    for name, source, flags in units():
        lines += [f"build {name}: compile {_escaped(SOURCES / source)}", f"  flags = {flags}"]
    lines.append(f"build {library}: link {' '.join(name for name, _, _ in units())}")
    return "\n".join([*lines, ""])


def build(library: Path, folder: Path) -> None:
    """Compile what has changed in ``folder``, and put the result at ``library``.

    Raises:
        FileNotFoundError: something that is needed is not there; the message says what.
        OSError, subprocess.CalledProcessError: a step fails.
    """
    compiler = nvcc()
    if compiler is None:
        raise FileNotFoundError("nvcc: expected it in CUDA_HOME/bin or on PATH, found none")
    torch = find_spec("torch")
    if torch is None or torch.origin is None:
        raise FileNotFoundError("torch: expected the package (its headers are compiled against), found none")
    ninja = _ninja()
    if ninja is None:
        raise FileNotFoundError("ninja: expected it on PATH, found none; pip install ninja")
    folder.mkdir(parents=True, exist_ok=True)
    text = plan(library.name, compiler, Path(torch.origin).parent, _cutlass(folder))
    (folder / "build.ninja").write_text(text)
    jobs = [f"-j{os.environ['MAX_JOBS']}"] if os.environ.get("MAX_JOBS") else []
    subprocess.run([ninja, "-C", str(folder), *jobs, library.name], check=True)
    library.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / library.name, library)


def _ninja() -> str | None:
    # Beside Python is where pip puts it, which is not on PATH when an environment is used without being activated.
    return shutil.which("ninja") or shutil.which("ninja", path=Path(sys.executable).parent)


def _cutlass(folder: Path) -> Path:
    """The folder with cute/: CUTLASS_INCLUDE, or one in ``folder``, filled from the package index at first."""
    if given := os.environ.get("CUTLASS_INCLUDE"):
        if not (Path(given) / "cute").is_dir():
            raise FileNotFoundError(f"CUTLASS_INCLUDE: expected a folder that has cute/, got {given}")
        return Path(given).resolve()
    headers = folder / CUTLASS.replace("==", "-")
    if not headers.exists():
        # Never installed: as a dependency the package brings along much that headers do not need.
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", CUTLASS]
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            subprocess.run([*download, "--dest", temporary], check=True)
            (wheel,) = Path(temporary).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                prefix = "cutlass_library/source/include/"
                archive.extractall(temporary, [name for name in archive.namelist() if name.startswith(prefix)])
            (Path(temporary) / prefix).rename(headers)
    return headers


def _escaped(path: Path) -> str:
    """A path in a list of inputs, which ninja itself quotes for the shell."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
