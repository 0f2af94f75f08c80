"""vLLM-Omni prepared for tests. It knows GPUs only, and imports packages that have no CPU build.

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
    """Where no GPU is, make `vllm_omni` importable, and the CPU its platform. Keep what it returns."""
    gpu = torch.cuda.is_available()
    # Of entry points: the platform, or what lost_outputs.py mends. Processes to come load sitecustomize.py there.
    plugin = str(Path(__file__).with_name("plugin_gpu" if gpu else "plugin"))
    sys.path.append(plugin)
    paths = (plugin, str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "") if gpu else "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if gpu:
        return None
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
