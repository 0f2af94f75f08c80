"""vLLM-Omni's own engine with tiny pipelines: 0.30 on a CPU, 0.26 on a Hopper GPU. Else skipped, with the reason."""

from __future__ import annotations

import asyncio
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.omni.prepare import prepare
from tests.omni.tiny import FRAMES, HEIGHT, STEPS, WIDTH, save_pipeline

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

OLD = importlib.util.find_spec("vllm_omni") is not None and metadata.version("vllm-omni").startswith("0.26.")
GPU = torch.cuda.is_available()

looks_inside = pytest.mark.skipif(OLD, reason="looks into the worker, which has a process of its own in vLLM-Omni 0.26")
cpu_only = pytest.mark.skipif(
    GPU, reason="calls parts of vLLM-Omni with tensors on the CPU, which it does not do on GPUs"
)

STOCK = "FLASH_ATTN" if GPU else "TORCH_SDPA"
DTYPE = "bfloat16" if GPU else "float32"
VIDEO = (480, 832, 33) if GPU else (HEIGHT, WIDTH, FRAMES)
"""Height, width and frames of the engine's videos: 14,040 tokens on a GPU, 384 on a CPU."""
TOKENS = ((VIDEO[2] - 1) // 4 + 1) * (VIDEO[0] // 16) * (VIDEO[1] // 16)

NEEDED = ("vllm_omni", "vllm", "torchvision", "diffusers")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.engine)
            if missing:
                item.add_marker(pytest.mark.skip(reason=f"needs {', '.join(missing)}"))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Folders of tiny Wan pipelines, by number of experts."""
    prepare()
    return {experts: save_pipeline(tmp_path_factory.mktemp("wan") / str(experts), experts) for experts in (1, 2)}


class Engine:
    """An engine in the test's own process."""

    def __init__(self, model: Path, backend: str, **settings: Any) -> None:
        from vllm_omni.entrypoints.async_omni import AsyncOmni

        self.loop = asyncio.new_event_loop()
        defaults: dict[str, Any] = {"enforce_eager": True, "dtype": DTYPE}
        attention = {"default": {"backend": backend}}
        self.omni = AsyncOmni(model=str(model), diffusion_attention_config=attention, **defaults | settings)

    def run(self, *jobs: dict[str, Any], abort: int | None = None) -> list[Any]:
        """Outputs, or exceptions, of jobs that are there together; `abort` ends one soon after its start."""

        async def one(number: int, job: dict[str, Any]) -> Any:
            from vllm_omni.inputs.data import OmniDiffusionSamplingParams

            options: dict[str, Any] = {"guidance_scale": 3.0, "num_inference_steps": STEPS, "seed": number}
            options |= dict(zip(("height", "width", "num_frames"), VIDEO, strict=True)) | job
            lite_attn = options.pop("lite_attn", None)
            params = OmniDiffusionSamplingParams(
                output_type="latent",
                extra_args={} if lite_attn is None else {"lite_attn": lite_attn},
                guidance_scale_provided=True,
                **options,
            )
            name = f"job-{number}"
            if abort == number:
                task = asyncio.current_task()

                async def end() -> None:
                    await self.omni.abort(name)
                    if OLD and task is not None:
                        task.cancel()  # who was aborted hears nothing any more in 0.26

                asyncio.get_running_loop().call_later(0.05, lambda: asyncio.ensure_future(end()))
            last = None
            async for output in self.omni.generate({"prompt": "a cat"}, params, request_id=name):
                last = output
            return last

        async def all_jobs() -> list[Any]:
            return await asyncio.gather(*(one(*item) for item in enumerate(jobs)), return_exceptions=True)

        return self.loop.run_until_complete(asyncio.wait_for(all_jobs(), 120))

    def close(self) -> None:
        self.omni.shutdown()
        self.loop.close()


def latents(output: Any) -> torch.Tensor:
    """Of a video, (1, channels, frames, height, width)."""
    if isinstance(output, BaseException):
        raise output
    (image,) = output.images
    return torch.as_tensor(image)


@pytest.fixture(scope="module")
def engine(models: dict[int, Path]) -> Callable[..., Any]:
    """`with engine(experts, backend, **settings) as e`: an engine that is gone after the block."""

    @contextmanager
    def start(experts: int = 1, backend: str = "LITE_ATTN", **settings: Any) -> Iterator[Engine]:
        running = Engine(models[experts], backend, **settings)
        try:
            yield running
        finally:
            running.close()

    return start
