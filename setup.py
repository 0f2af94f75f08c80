"""Builds the kernels in csrc into lite_attention/native; everything else stands in pyproject.toml.

The CPU library has a plain C interface: it needs neither PyTorch nor Python to build and serves every Python.
`CXX` picks the compiler; `LITE_ATTENTION_CPU=0` leaves the library out.

The CUDA library is built where nvcc is found, by csrc/build_cuda.py, and then needs PyTorch as well.
`LITE_ATTENTION_CUDA=0` leaves it out; with `LITE_ATTENTION_CUDA=1` the installation fails where it cannot be built.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import build_cuda  # noqa: E402

FLAGS = ["-O3", "-std=c++17", "-fopenmp", "-fPIC", "-fno-math-errno", "-ffp-contract=fast"]
CPU_LIBRARY = "lite_attention.native.liblite_attention_cpu"
CUDA_LIBRARY = "lite_attention.native.liblite_attention_cuda"
CUDA_ASKED = os.environ.get("LITE_ATTENTION_CUDA", "")
WITHOUT = {
    CPU_LIBRARY: "LITE_ATTN will run its much slower PyTorch implementation. Install a C++17 compiler with OpenMP and "
    "install again; LITE_ATTENTION_CPU=0 silences this.",
    CUDA_LIBRARY: "On GPUs attention will be dense. LITE_ATTENTION_CUDA=0 silences this.",
}
"""What follows when a library is missing, for the warning."""

KERNELS = "csrc/cpu/kernels.cpp"
DISPATCH = "csrc/cpu/dispatch.cpp"

# The kernels are compiled once for each instruction set; the dispatcher picks one when the library is loaded.
X86_64_ISAS = {"v3": ["-march=x86-64-v3"], "v4": ["-march=x86-64-v4"]}
OTHER_ISAS: dict[str, list[str]] = {"generic": []}


def compile_library(library: Path, objects: Path) -> None:
    """Compiles and links csrc/cpu; raises what subprocess raises."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    isas = X86_64_ISAS if platform.machine() in ("x86_64", "AMD64") else OTHER_ISAS
    units = {f"kernels_{isa}.o": [KERNELS, f"-DLITE_ISA={isa}", *flags] for isa, flags in isas.items()}
    units["dispatch.o"] = [DISPATCH]
    objects.mkdir(parents=True, exist_ok=True)
    library.parent.mkdir(parents=True, exist_ok=True)

    def compile_unit(name: str) -> str:
        target = str(objects / name)
        subprocess.run([*compiler, *FLAGS, "-c", *units[name], "-o", target], check=True)
        return target

    with ThreadPoolExecutor() as pool:
        compiled = list(pool.map(compile_unit, units))
    # Linked beside the old one and renamed over it: a process that has the old one loaded keeps it whole.
    linked = library.with_suffix(".so.new")
    subprocess.run([*compiler, "-shared", "-fopenmp", *compiled, "-o", str(linked)], check=True)
    linked.replace(library)


class BuildLibrary(build_ext):
    """Builds the extensions as plain shared libraries, and goes on without those that cannot be compiled."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name))
        cuda = ext.name == CUDA_LIBRARY
        try:
            if cuda:
                # Always the same folder, so that a second build does nothing.
                build_cuda.build(library, ROOT / "build" / "cuda")
            else:
                compile_library(library, Path(self.build_temp))
        except (OSError, subprocess.CalledProcessError) as error:
            library.unlink(missing_ok=True)
            if cuda and CUDA_ASKED == "1":
                raise
            self.warn(f"the {'CUDA' if cuda else 'CPU'} kernels were NOT built: {error}. {WITHOUT[ext.name]}")


class PlatformWheel(bdist_wheel):
    """A wheel for every Python on one platform."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, system = super().get_tag()
        return (python, abi, system) if self.root_is_pure else ("py3", "none", system)


extensions = []
if os.environ.get("LITE_ATTENTION_CPU", "1") != "0":
    extensions.append(Extension(CPU_LIBRARY, sources=[KERNELS, DISPATCH], optional=True))
build_cuda_library = CUDA_ASKED == "1" or (CUDA_ASKED != "0" and build_cuda.nvcc() is not None)
if build_cuda_library:
    extensions.append(Extension(CUDA_LIBRARY, sources=[], optional=CUDA_ASKED != "1"))
setup(
    ext_modules=extensions,
    zip_safe=False,  # `setup.py install` would zip it, and libraries are not loaded from a zip
    setup_requires=build_cuda.requirements() if build_cuda_library else [],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
