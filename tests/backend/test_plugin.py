"""The plugin stays out of the way until LITE_ATTN is asked for. Each case runs in a fresh process."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
]

START = """
import pickle, subprocess, sys
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.v1.attention.backends.registry import AttentionBackendEnum
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", START + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_without_the_name_nothing_is_hooked() -> None:
    run("""
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.scheduler import Scheduler
assert "LITE_ATTN" not in AttentionBackendEnum.__members__
assert current_platform.get_attn_backend_cls.__module__.startswith("vllm.")
for hooked in (SamplingParams.verify, SamplingParams.from_optional, Scheduler.__init__):
    assert not hasattr(hooked, "_lite_attn"), hooked
assert "lite_attention.backend.vllm.hooks" not in sys.modules
SamplingParams(extra_args={"lite_attn_threshold": "anything"})
try:
    AttentionBackendEnum["NO_SUCH_BACKEND"]
except ValueError as error:
    assert "Unknown attention backend" in str(error)
else:
    raise AssertionError
""")


def test_the_name_makes_one_member_and_hooks() -> None:
    run("""
member = AttentionBackendEnum["LITE_ATTN"]
assert AttentionBackendEnum["LITE_ATTN"] is member is AttentionBackendEnum.LITE_ATTN
assert member.name == "LITE_ATTN" and member.get_class().__name__ == "LiteAttentionBackend"
from vllm.sampling_params import SamplingParams
assert SamplingParams.verify._lite_attn
first = SamplingParams.verify
load_general_plugins()
AttentionBackendEnum["LITE_ATTN"]
assert SamplingParams.verify is first
""")


def test_wherever_outputs_are_asked_for_sparsity_workers_answer() -> None:
    run("""
from vllm.v1.worker.worker_base import WorkerBase
from lite_attention.backend.vllm import hooks
hooks.install_worker_hooks()
assert WorkerBase.lite_attn_take_stats(None) == {}
""")


def test_a_process_that_has_not_loaded_its_plugins_unpickles_the_member() -> None:
    run("""
pickled = pickle.dumps(AttentionBackendEnum["LITE_ATTN"])
code = f"import pickle; assert pickle.loads({pickled!r}).name == 'LITE_ATTN'"
subprocess.run([sys.executable, "-c", code], check=True)
""")


def test_a_missing_hook_fails_at_start_up_and_names_the_versions() -> None:
    output = run("""
from vllm.sampling_params import SamplingParams
del SamplingParams.verify
try:
    AttentionBackendEnum["LITE_ATTN"]
except RuntimeError as error:
    print(error)
""")
    assert "LITE_ATTN needs vllm.sampling_params.SamplingParams.verify" in output
    assert "0.30" in output and "0.32" in output


def test_an_untested_version_is_warned_of() -> None:
    output = run("""
import vllm
vllm.__version__ = "0.99.1"
from lite_attention.backend.vllm import support
support.logger.warning = lambda message, *values: print(message % values)
support.warn_of_untested_version("cpu")
""")
    assert "LITE_ATTN was tested with vLLM 0.30, 0.32 on cpu, this is 0.99.1" in output
