"""The places where vLLM-Omni is wrapped, all of them, from the moment when the first layer asks for LITE_ATTN.

| wrapped | what for |
|---|---|
| `DiffusionModelRunner.execute_model`, `.execute_model_batch` | which requests are executed, HTTP 400 for bad options |
| `DiffusionWorker.sleep` | no memory of skip states is kept in a sleeping engine |
| `DiffusionEngine.postprocess_output` | outputs say their sparsity |

Layers are made in workers. Where the engine is another process, its part comes with the first output (`_Skipped`).

A wrapped attribute that is missing fails at start-up. Nothing that a client sends raises in a worker: a bad option is
answered by an output that carries the error.
"""

from __future__ import annotations

import copy
import itertools
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lite_attention.backend.omni.execution import Request, executing, long_layers, uses_lite_attention
from lite_attention.backend.omni.pool import StatePool
from lite_attention.backend.vllm.plugin import metrics_directory
from lite_attention.backend.wrapping import wrap
from lite_attention.costs import Shape
from lite_attention.serving import metrics
from lite_attention.serving.params import (
    CONFIG_KEY,
    DenoiseOptions,
    DenoiseServerOptions,
    LiteParamError,
    parse_denoise_request,
)

if TYPE_CHECKING:
    from lite_attention.backend.omni.attention import LiteAttentionImpl

TESTED_VERSIONS = ("0.26", "0.30")
"""Minor releases of vLLM-Omni that this adapter was run on."""

_DUMMY = DenoiseOptions(threshold=0.0, enable=False, refresh_interval=0, warmup_steps=0, cooldown_steps=0)

_stages = itertools.count()


class _Stage:
    """What belongs to one runner: vLLM-Omni may have several in a process, each with a model and options of its own.

    Attributes:
        server: its options.
        counters: its metrics.
        pool: memory of its requests' states.
    """

    def __init__(self, config: Any, pipeline: Any) -> None:
        self.server = _server_options(config)
        _check_profiles(self.server, long_layers(pipeline))
        slots = int(getattr(config, "max_num_seqs", None) or 1)
        path = metrics_directory() / f"omni-{os.getpid()}-{next(_stages)}"
        self.counters = metrics.StepCounters.create(path, slots=slots)
        self.pool = StatePool(self.counters.set_state_bytes)
        weakref.finalize(self, self.counters.end).atexit = False  # with its runner

    @classmethod
    def of(cls, runner: Any) -> _Stage | None:
        """The stage of a runner, made when it is first asked for; None where no layer is ours.

        Raises:
            ValueError: a profile was made for another model.
        """
        if not hasattr(runner, "lite_attn_stage"):
            pipeline = runner.pipeline
            runner.lite_attn_stage = cls(runner.od_config, pipeline) if uses_lite_attention(pipeline) else None
        stage: _Stage | None = runner.lite_attn_stage
        return stage


def _server_options(config: Any) -> DenoiseServerOptions:
    return DenoiseServerOptions.from_additional_config(getattr(config, "additional_config", None))


def _check_profiles(server: DenoiseServerOptions, layers: Mapping[str, LiteAttentionImpl]) -> None:
    """Raises ValueError unless all profiles are for the layers of this model; the number of keys is a request's."""
    for name, profile in server.profiles.items():
        try:
            profile.check_layers(layers)
            for layer in layers.values():
                profile.check_shape(Shape(profile.shape.tokens, layer.heads, layer.head_dim))
        except ValueError as error:
            raise ValueError(f"additional_config.{CONFIG_KEY}.profiles: {name!r}: {error}") from None


def install(config: Any) -> None:
    """Wrap a worker's process, and check the server's options. Idempotent.

    Args:
        config: vLLM-Omni's configuration of a diffusion stage; None where there is none.

    Raises:
        ValueError: an option of the server cannot be used.
        RuntimeError: this vLLM-Omni lacks what is to be wrapped.
    """
    _server_options(config)
    from vllm_omni.diffusion.worker.diffusion_model_runner import DiffusionModelRunner
    from vllm_omni.diffusion.worker.diffusion_worker import DiffusionWorker

    _wrap(DiffusionModelRunner, "execute_model", _execute_model)
    _wrap(DiffusionModelRunner, "execute_model_batch", _execute_model_batch)
    _wrap(DiffusionWorker, "sleep", _sleep)
    _install_in_engine(metrics_directory())


def _install_in_engine(directory: Path) -> None:
    """Wrap the engine's process, whose metrics are what workers count in this directory. Idempotent."""
    from vllm_omni.diffusion.diffusion_engine import DiffusionEngine

    _wrap(DiffusionEngine, "postprocess_output", _postprocess_output)
    metrics.register(directory)


def _wrap(owner: type, name: str, wrapper: Callable[..., Any]) -> None:
    from vllm_omni.version import __version__ as version

    wrap(owner, name, wrapper, f"vLLM-Omni {version}", ", ".join(TESTED_VERSIONS))


def _parse(request: Any, server: DenoiseServerOptions) -> Request:
    params = request.sampling_params
    dummy = request.is_dummy_run_request_id(request.request_id)
    options = _DUMMY if dummy else parse_denoise_request(params.extra_args, server)
    profile = None if options.profile is None else server.profiles[options.profile]
    return Request(request.request_id, options, params.num_outputs_per_prompt or 1, server.rule, profile)


def _refusal(error: LiteParamError) -> Any:
    from vllm_omni.diffusion.data import DiffusionOutput
    from vllm_omni.errors import OmniClientError

    return DiffusionOutput.from_exception(OmniClientError(str(error)))


@contextmanager
def _running(stage: _Stage, pipeline: Any, requests: list[Request]) -> Iterator[None]:
    """`executing`, counted."""
    stage.counters.set_active_slots(sum(request.options.skips for request in requests))
    try:
        with executing(pipeline, requests, stage.pool):
            yield
    finally:
        stage.counters.set_active_slots(0)


def _execute_model(original: Callable[..., Any], self: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    stage = _Stage.of(self)
    if stage is None:
        return original(self, req, *args, **kwargs)
    try:
        request = _parse(req, stage.server)
        with _running(stage, self.pipeline, [request]):
            output = original(self, req, *args, **kwargs)
    except LiteParamError as error:
        return _refusal(error)
    _finish(stage, request, output)
    return output


def _execute_model_batch(
    original: Callable[..., Any], self: Any, scheduler_output: Any, *args: Any, **kwargs: Any
) -> Any:
    from vllm_omni.diffusion.worker.utils import BatchRunnerOutput, RunnerOutput

    stage = _Stage.of(self)
    if stage is None:
        return original(self, scheduler_output, *args, **kwargs)
    scheduled = scheduler_output.scheduled_new_reqs
    requests: list[Request] = []
    outputs: dict[str, Any] = {}

    def refuse(request_id: str, error: LiteParamError) -> None:
        outputs[request_id] = RunnerOutput(
            request_id=request_id, step_index=None, finished=True, result=_refusal(error)
        )

    for new in scheduled:
        try:
            requests.append(_parse(new.req, stage.server))
        except LiteParamError as error:
            refuse(new.request_id, error)
    if requests:
        good = copy.copy(scheduler_output)
        good.scheduled_new_reqs = [new for new in scheduled if new.request_id not in outputs]
        with suppress(LiteParamError), _running(stage, self.pipeline, requests):
            done = original(self, good, *args, **kwargs).runner_outputs
            outputs |= {output.request_id: output for output in done}
        for request in requests:
            if request.refusal is not None:
                refuse(request.request_id, request.refusal)
            else:
                _finish(stage, request, outputs[request.request_id].result)
    return BatchRunnerOutput.from_list([outputs[new.request_id] for new in scheduled])


def _finish(stage: _Stage, request: Request, output: Any) -> None:
    """Count what a request skipped, and note it in its output."""
    visited = round(float(request.visited))
    if request.total:
        stage.counters.add_rows(request.options.threshold, request.rows, visited, request.total)
    sparsity = 1 - visited / request.total if request.total else None
    output.lite_attn = _Skipped(sparsity=sparsity, blocks_visited=visited, blocks_total=request.total)


class _Skipped(dict[str, Any]):
    """What a request skipped, on the way from its worker to the engine.

    An engine in another process than its worker makes no layer, so nothing installs our part there. This does, when
    it is unpickled.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (dict(self), metrics_directory())


def _received(skipped: dict[str, Any], directory: Path) -> dict[str, Any]:
    _install_in_engine(directory)
    return skipped


def _postprocess_output(original: Callable[..., Any], self: Any, request: Any, output: Any) -> Any:
    results = original(self, request, output)
    skipped = getattr(output, "lite_attn", None)
    if skipped is not None:
        for result in results:
            result.custom_output["lite_attn"] = dict(skipped)
    return results


def _sleep(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    stage: _Stage | None = getattr(self.model_runner, "lite_attn_stage", None)
    if stage is not None:
        stage.pool.trim()  # no request is executed, so nothing is in use
    return original(self, *args, **kwargs)
