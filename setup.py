"""Builds the CPU kernels in csrc/cpu into lite_attention/native; everything else stands in pyproject.toml.

The library has a plain C interface: it needs neither PyTorch nor Python to build and serves every Python.
`CXX` picks the compiler; `LITE_ATTENTION_CPU=0` leaves the library out.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FLAGS = ["-O3", "-std=c++17", "-fopenmp", "-fPIC", "-fno-math-errno", "-ffp-contract=fast"]
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
    """Builds the extension as a plain shared library, and goes on without it when it cannot be compiled."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name))
        try:
            compile_library(library, Path(self.build_temp))
        except (OSError, subprocess.CalledProcessError) as error:
            library.unlink(missing_ok=True)
            self.warn(
                f"the CPU kernels were NOT built: {error}. LITE_ATTN will run its much slower PyTorch "
                "implementation. Install a C++17 compiler with OpenMP and install again; "
                "LITE_ATTENTION_CPU=0 silences this."
            )


class PlatformWheel(bdist_wheel):
    """A wheel for every Python on one platform."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, system = super().get_tag()
        return (python, abi, system) if self.root_is_pure else ("py3", "none", system)


wanted = os.environ.get("LITE_ATTENTION_CPU", "1") != "0"
setup(
    ext_modules=[Extension("lite_attention.native.liblite_attention_cpu", sources=[KERNELS, DISPATCH], optional=True)]
    if wanted
    else [],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
