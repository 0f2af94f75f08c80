"""Real engines and a real model. Skipped, with the reason, where vLLM's CPU engine, or a GPU, is not there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(os.__file__).with_name("argparse.py").read_text()

# An engine in the test's own process, so that a test can look into it; a small cache, so that it starts anywhere.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    platform, reason = _platform()
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.engine)
            needed = ("cuda",) if item.get_closest_marker("gpu") else ("cpu",)
            if item.get_closest_marker("any_platform"):
                needed = ("cpu", "cuda")
            if platform not in needed:
                item.add_marker(pytest.mark.skip(reason=f"needs vLLM on {' or '.join(needed)}: {reason}"))


def _platform() -> tuple[str, str]:
    """The platform that the installed vLLM runs on, and why it is that one."""
    try:
        from vllm.platforms import current_platform
    except ImportError as error:
        return "", str(error)
    return current_platform.device_type, f"the one installed runs on {current_platform.device_type or 'nothing'}"


@pytest.fixture(scope="session")
def model() -> str:
    """Folder of SmolLM2-135M-Instruct, fetched and converted on first use."""
    command = [str(Path(sys.executable).with_name("lite-attention")), "model", "smollm2"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


@dataclass
class Job:
    """A request: a prompt of so many tokens of source code, and its `lite_attn_*` options."""

    prompt_tokens: int
    options: dict[str, Any]
    max_tokens: int = 24
    start: int = 0
    logprobs: int | None = None


class Engine:
    """An offline engine whose steps the test takes."""

    def __init__(self, model: str, backend: str, **settings: Any) -> None:
        from vllm import LLM

        defaults: dict[str, Any] = {"enforce_eager": True, "max_model_len": 2048, "max_num_seqs": 16, "seed": 0}
        self.llm = LLM(model, attention_backend=backend, disable_log_stats=False, **defaults | settings)
        self.detokenize = not settings.get("skip_tokenizer_init")
        self.source = self.llm.get_tokenizer().encode(SOURCE) if self.detokenize else list(SOURCE.encode())
        self.number = 0

    def prompt(self, job: Job) -> dict[str, Any]:
        return {"prompt_token_ids": self.source[job.start : job.start + job.prompt_tokens]}

    def params(self, job: Job) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=0,
            max_tokens=job.max_tokens,
            ignore_eos=True,
            extra_args=dict(job.options) or None,
            detokenize=self.detokenize,
            logprobs=job.logprobs,
        )

    def generate(self, jobs: list[Job]) -> list[Any]:
        """Outputs through `LLM.generate`."""
        prompts: list[Any] = [self.prompt(job) for job in jobs]
        return self.llm.generate(prompts, [self.params(job) for job in jobs], use_tqdm=False)

    def tokens(self, jobs: list[Job], abort: dict[int, int] | None = None) -> list[list[int]]:
        """Tokens of jobs that run together; `abort` ends a job (by place) before the step of that number."""
        engine = self.llm.llm_engine
        names = [f"test-{self.number + place}" for place in range(len(jobs))]
        self.number += len(jobs)
        for name, job in zip(names, jobs, strict=True):
            engine.add_request(name, self.prompt(job), self.params(job))
        tokens: dict[str, list[int]] = {name: [] for name in names}
        steps = 0
        while engine.has_unfinished_requests():
            for place, step in (abort or {}).items():
                if step == steps:
                    engine.abort_request([names[place]])
            for output in engine.step():
                tokens[output.request_id] = list(output.outputs[0].token_ids)
            steps += 1
        return [tokens[name] for name in names]

    @property
    def tracker(self) -> Any:
        from lite_attention.backend.vllm import steps

        return steps.tracker()


@pytest.fixture
def engine(model: str) -> Callable[..., Any]:
    """`with engine("LITE_ATTN", **settings) as e`: an engine that is gone after the block."""

    @contextmanager
    def start(backend: str, **settings: Any) -> Iterator[Engine]:
        from vllm.distributed import cleanup_dist_env_and_memory

        running = Engine(settings.pop("model", model), backend, **settings)
        try:
            yield running
        finally:
            running.llm.llm_engine.engine_core.shutdown()
            del running.llm
            cleanup_dist_env_and_memory()

    return start
