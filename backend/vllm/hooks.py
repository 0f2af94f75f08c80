"""The places where vLLM is wrapped, all of them, and only where LITE_ATTN was asked for.

| process | wrapped | what for |
|---|---|---|
| all, on CPUs | `CpuPlatform.get_attn_backend_cls` | vLLM's CPU platform knows one backend: lead it to ours |
| front end | `InputProcessor.__init__` | read and check the server's options at start-up |
| front end | `SamplingParams.from_optional`, `.verify` | HTTP 400 for bad request parameters, streaming or not |
| front end | `LLM._run_engine` | offline outputs say their sparsity |
| engine core | `Scheduler.__init__` | keys computed under skipping are not shared as prefixes |
| worker | `GPUModelRunner.execute_model`, `._dummy_run`, of both model runners | which requests a step serves |
| worker | `GPUModelRunner.prepare_attn` of the V2 model runner | the order of a batch's rows |
| worker, on GPUs | `GPUModelRunner.initialize_kv_cache`, of both model runners | summaries beside the KV cache |
| worker, on GPUs | `Worker.determine_available_memory` | the summaries' part of the KV cache's memory |
| worker, on GPUs | `Worker.compile_or_warm_up_model` | requests that vLLM invents to warm up are not counted |
| worker | `WorkerBase.lite_attn_take_stats` (new) | sparsity of each request, asked for by the front end |
| worker | `WorkerBase.lite_attn_layers`, `.lite_attn_replay`, `.lite_attn_take_costs` (new) | calibration |

A wrapped attribute that is missing fails at start-up.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from dataclasses import astuple
from enum import Enum
from typing import Any

from lite_attention.backend.vllm import state, steps, support
from lite_attention.backend.wrapping import wrap
from lite_attention.costs import Meter
from lite_attention.serving.params import LiteParamError, ServerOptions, parse_request, parse_request_lenient

_server = ServerOptions()


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    from vllm import __version__ as version

    wrap(owner, name, wrapper, f"vLLM {version}", f"{support.TESTED_VERSIONS}")


def install_process_hooks(member: Enum) -> None:
    """Hooks of every process that was configured with LITE_ATTN."""
    from vllm.platforms import current_platform
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.input_processor import InputProcessor

    if current_platform.is_cpu():
        _route_cpu_platform(type(current_platform), member)
    _wrap(Scheduler, "__init__", _keep_skipping_out_of_the_prefix_cache)
    _wrap(InputProcessor, "__init__", _read_server_options)
    _wrap(SamplingParams, "from_optional", _check_built_parameters)
    _wrap(SamplingParams, "verify", _verify_parameters)
    offline = sys.modules.get("vllm.entrypoints.llm")
    if offline is not None:
        _wrap(offline.LLM, "_run_engine", _attach_sparsity)


def install_worker_hooks() -> None:
    """Hooks of a process that runs the model."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as ModelRunnerV2
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as ModelRunnerV1
    from vllm.v1.worker.worker_base import WorkerBase

    for runner in (ModelRunnerV1, ModelRunnerV2):
        _wrap(runner, "execute_model", _execute_model)
        _wrap(runner, "_dummy_run", _dummy_run)
    _wrap(ModelRunnerV2, "prepare_attn", _prepare_attn)
    WorkerBase.lite_attn_take_stats = _take_stats
    WorkerBase.lite_attn_layers = _layers
    WorkerBase.lite_attn_replay = _replay
    WorkerBase.lite_attn_take_costs = _take_costs


def install_gpu_worker_hooks() -> None:
    """Hooks of a process whose device has no memory to spare, and that vLLM warms up with requests of its own."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as ModelRunnerV2
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as ModelRunnerV1
    from vllm.v1.worker.gpu_worker import Worker

    for runner in (ModelRunnerV1, ModelRunnerV2):
        _wrap(runner, "initialize_kv_cache", _allocate_summaries)
    _wrap(Worker, "determine_available_memory", _leave_memory_for_summaries)
    _wrap(Worker, "compile_or_warm_up_model", _warm_up)


def _route_cpu_platform(platform: Any, member: Enum) -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    original = platform.get_attn_backend_cls

    def get_attn_backend_cls(cls: Any, selected: Any, *args: Any, **kwargs: Any) -> str:
        path: str = original(None if selected is member else selected, *args, **kwargs)
        if selected is not member:
            return path
        if path != AttentionBackendEnum.CPU_ATTN.get_path():
            support.logger.warning_once("LITE_ATTN cannot act on this model's attention; using %s instead", path)
            return path
        return str(member.value)

    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)


def _read_server_options(original: Callable[..., None], self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    global _server
    _server = support.server_options(vllm_config)
    original(self, vllm_config, *args, **kwargs)


def _check(params: Any) -> None:
    try:
        parse_request(params.extra_args, _server)
    except LiteParamError as error:
        raise _request_error()(str(error), parameter=error.parameter) from None


@functools.cache
def _request_error() -> Any:
    """An error that every supported vLLM turns into HTTP 400."""
    from vllm.exceptions import VLLMValidationError

    if issubclass(VLLMValidationError, ValueError):
        return VLLMValidationError
    return type("LiteRequestError", (VLLMValidationError, ValueError), {})


def _check_built_parameters(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    params = original(*args, **kwargs)
    _check(params)
    return params


def _verify_parameters(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    _check(self)


def _keep_skipping_out_of_the_prefix_cache(
    original: Callable[..., None], self: Any, vllm_config: Any, *args: Any, **kwargs: Any
) -> None:
    # Keys and values of generated tokens depend on what was skipped before them: shared as a prefix they would
    # carry one request's options into another. The prompt's do not, and stay shared.
    original(self, vllm_config, *args, **kwargs)
    if support.config_reason(vllm_config) is not None:
        return
    server = ServerOptions.from_additional_config(vllm_config.additional_config)
    coordinator = self.kv_cache_manager.coordinator
    cache_blocks = coordinator.cache_blocks

    def cache_dense_blocks(request: Any, num_computed_tokens: int) -> None:
        params = request.sampling_params
        dense_tokens = getattr(request, "lite_attn_dense_tokens", None)
        if dense_tokens is None and params is not None and parse_request_lenient(params.extra_args, server).skips:
            # Kept: where input streams in, what was generated counts as prompt later.
            dense_tokens = request.lite_attn_dense_tokens = request.num_prompt_tokens
        if dense_tokens is not None:
            num_computed_tokens = min(num_computed_tokens, dense_tokens)
        cache_blocks(request, num_computed_tokens)

    coordinator.cache_blocks = cache_dense_blocks


def _attach_sparsity(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    outputs = original(self, *args, **kwargs)
    visited: dict[str, int] = {}
    total: dict[str, int] = {}
    for rank in self.llm_engine.collective_rpc("lite_attn_take_stats"):
        for internal_id, (blocks_visited, blocks_total) in rank.items():
            request_id = _offline_request_id(internal_id)
            visited[request_id] = visited.get(request_id, 0) + blocks_visited
            total[request_id] = total.get(request_id, 0) + blocks_total
    for output in outputs:
        seen, of = visited.get(output.request_id, 0), total.get(output.request_id, 0)
        sparsity = 1 - seen / of if of else None
        output.lite_attn = {"sparsity": sparsity, "blocks_visited": seen, "blocks_total": of}
    return outputs


def _offline_request_id(internal_id: str) -> str:
    """`LLM` numbers its requests; the engine may put a sample's number before and a random suffix behind."""
    matched = re.fullmatch(r"(?:\d+_)?(\d+)(?:-\w+)?", internal_id)
    return matched[1] if matched else internal_id


def _tracker_of(runner: Any) -> steps.StepTracker:
    tracker = getattr(runner, "lite_attn_tracker", None)
    if tracker is None:
        config = runner.vllm_config
        server, layers = support.server_options(config), state.number_layers(config)
        rank = config.parallel_config.rank
        counts_rows = rank % config.parallel_config.tensor_parallel_size == 0
        tracker = runner.lite_attn_tracker = steps.create_tracker(
            server, support.pool_slots(config), rank, counts_rows, runner.device.type == "cuda", layers
        )
    return tracker


def _execute_model(original: Callable[..., Any], self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("dummy_run") or getattr(self, "lite_attn_warms_up", False):  # of the V2 model runner
        return original(self, scheduler_output, *args, **kwargs)
    copies = getattr(scheduler_output, "kv_cache_block_copies", None)
    if copies:
        state.copy_blocks(_states_of(self), copies, self.kv_cache_config.num_blocks)
    tracker = _tracker_of(self)
    with tracker.step(scheduler_output, lambda: _input_batch(self).req_ids):
        result = original(self, scheduler_output, *args, **kwargs)
    tracker.count_memory(lambda: state.memory_bytes(_states_of(self)))
    return result


def _states_of(runner: Any) -> list[state.LayerState]:
    return [layer.impl.state for layer in state.skipping_layers(runner.vllm_config).values()]


def _input_batch(runner: Any) -> Any:
    """The batch of the step in progress: V1 keeps one for good, V2 hands a new one to `prepare_attn`."""
    batch = getattr(runner, "lite_attn_input_batch", None)
    return runner.input_batch if batch is None else batch


def _prepare_attn(original: Callable[..., Any], self: Any, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
    self.lite_attn_input_batch = input_batch
    return original(self, input_batch, *args, **kwargs)


def _dummy_run(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    with _tracker_of(self).suspended():
        return original(self, *args, **kwargs)


def _allocate_summaries(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    # Before anything is captured: an allocation inside a graph would be done again by each replay.
    original(self, *args, **kwargs)
    if self.device.type == "cpu":  # CPUModelRunner inherits what is wrapped, and its layers allocate when they need to
        return
    for layer in state.skipping_layers(self.vllm_config).values():
        layer.impl.allocate_summaries(layer.kv_cache)


def _leave_memory_for_summaries(original: Callable[..., int], self: Any) -> int:
    available = original(self)
    share = support.summaries_share(self.vllm_config, self.get_kv_cache_spec())
    cache = int(available / (1 + share))
    if cache < available:
        support.logger.info_once(
            "LITE_ATTN keeps %.2f of the %.2f GiB for the KV cache for its summaries.",
            (available - cache) / 2**30,
            available / 2**30,
        )
    return cache


def _warm_up(original: Callable[..., Any], self: Any) -> Any:
    self.model_runner.lite_attn_warms_up = True
    try:
        return original(self)
    finally:
        self.model_runner.lite_attn_warms_up = False


def _take_stats(worker: Any) -> dict[str, tuple[int, int]]:
    tracker = steps.tracker()
    return tracker.take_stats() if tracker is not None else {}


def _layers(worker: Any) -> list[str]:
    return list(_tracker_of(worker.model_runner).layers)


def _replay(worker: Any, prompt_tokens: int | None, thresholds: dict[str, float], refresh_interval: int) -> None:
    """Requests from now on are replayed, see `StepTracker.replay`, and measured; None for not any more."""
    tracker = _tracker_of(worker.model_runner)
    if prompt_tokens is None:
        tracker.end_replay()
        return
    tracker.replay(prompt_tokens, thresholds, refresh_interval)
    for layer_state in _states_of(worker.model_runner):
        layer_state.meter = layer_state.meter or Meter()


def _take_costs(worker: Any) -> dict[str, tuple[float, ...]]:
    """What skipping cost each layer since the last time: error, dropped, sparsity."""
    layers = state.skipping_layers(worker.model_runner.vllm_config)
    costs = {name: layer.impl.state.meter.read() for name, layer in layers.items() if layer.impl.state.meter}
    return {name: astuple(cost) for name, cost in costs.items()}
