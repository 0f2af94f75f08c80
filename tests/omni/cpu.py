"""vLLM-Omni on a CPU, for tests: it knows GPUs only, and imports packages that have no CPU build.

`prepare()` comes before the first import of `vllm_omni` in a process.
"""

from __future__ import annotations

import functools
import importlib.machinery
import os
import sys
from pathlib import Path
from types import ModuleType

import torch


@functools.cache
def prepare() -> torch.library.Library | None:
    """Make `vllm_omni` importable here, and the CPU its platform; nothing where a GPU is. Keep what it returns."""
    if torch.cuda.is_available():
        return None
    plugin = str(Path(__file__).with_name("plugin"))
    sys.path.append(plugin)  # an entry point names the platform
    # Processes to come load sitecustomize.py there.
    os.environ["PYTHONPATH"] = os.pathsep.join((plugin, str(Path(__file__).parents[2])))
    for name in ("torchaudio", "torchaudio.functional"):
        module = sys.modules[name] = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    sys.modules["torchaudio.functional"].melscale_fbanks = None  # type: ignore[attr-defined]
    # The published build of torchvision is for CUDA: beside a CPU build of PyTorch its operators are not loaded, and
    # its import fails where it describes them.
    operators = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return operators
