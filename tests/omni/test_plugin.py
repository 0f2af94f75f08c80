"""Loading the plugin makes a name known, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_loading_makes_the_name_known_and_nothing_else() -> None:
    code = """
from tests.omni.prepare import prepare
operators = prepare()
from vllm_omni.plugins import load_omni_general_plugins
from vllm_omni.diffusion.attention.backends.registry import DiffusionAttentionBackendEnum as names
load_omni_general_plugins()
from lite_attention.backend.omni import plugin
plugin.register()
import sys
from vllm_omni.diffusion.worker.diffusion_model_runner import DiffusionModelRunner
assert list(names.__members__).count("LITE_ATTN") == 1
assert "lite_attention.backend.omni.attention" not in sys.modules
assert not hasattr(DiffusionModelRunner.execute_model, "_lite_attn")
backend = names.LITE_ATTN.get_class()
assert backend.get_name() == "LITE_ATTN" and backend.supports_attention_mask()
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
