"""The places where vLLM is wrapped, all of them, and only where LITE_ATTN was asked for.

| process | wrapped | what for |
|---|---|---|
| all, on CPUs | `CpuPlatform.get_attn_backend_cls` | vLLM's CPU platform knows one backend: lead it to ours |
| front end | `InputProcessor.__init__` | read and check the server's options at start-up |
| front end | `SamplingParams.from_optional`, `.verify` | HTTP 400 for bad request parameters, streaming or not |
| front end | `LLM._run_engine` | offline outputs say their sparsity |
| engine core, on CPUs | `Scheduler.__init__` | keys computed under skipping are not shared as prefixes |
| worker, on CPUs | `GPUModelRunner.execute_model`, `._dummy_run` | which requests a step serves |
| worker | `WorkerBase.lite_attn_take_stats` (new) | sparsity of each request, asked for by the front end |

A wrapped attribute that is missing fails at start-up.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from enum import Enum
from typing import Any

from lite_attention.backend.vllm import state, steps, support
from lite_attention.backend.wrapping import wrap
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


def install_worker_hooks(follow_steps: bool) -> None:
    """Hooks of a process that runs the model; steps are followed where something can skip."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.worker_base import WorkerBase

    if follow_steps:
        _wrap(GPUModelRunner, "execute_model", _execute_model)
        _wrap(GPUModelRunner, "_dummy_run", _dummy_run)
    WorkerBase.lite_attn_take_stats = _take_stats


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
    _server = ServerOptions.from_additional_config(vllm_config.additional_config)
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
    server = ServerOptions.from_additional_config(vllm_config.additional_config)
    coordinator = self.kv_cache_manager.coordinator
    cache_blocks = coordinator.cache_blocks

    def cache_dense_blocks(request: Any, num_computed_tokens: int) -> None:
        params = request.sampling_params
        if params is not None and parse_request_lenient(params.extra_args, server).skips:
            num_computed_tokens = min(num_computed_tokens, request.num_prompt_tokens)
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
        server = ServerOptions.from_additional_config(config.additional_config)
        rank = config.parallel_config.rank
        counts_rows = rank % config.parallel_config.tensor_parallel_size == 0
        layers = config.compilation_config.static_forward_context.values()
        states = [layer.impl.state for layer in layers if getattr(getattr(layer, "impl", None), "state", None)]
        state_bytes = sum(state.memory_bytes() for state in states)
        tracker = runner.lite_attn_tracker = steps.create_tracker(
            server, support.pool_slots(config), rank, counts_rows, state_bytes
        )
    return tracker


def _execute_model(original: Callable[..., Any], self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
    for source, destination in getattr(scheduler_output, "kv_cache_block_copies", None) or ():
        state.copy_page(source, destination)
    with _tracker_of(self).step(scheduler_output, lambda: self.input_batch.req_ids):
        return original(self, scheduler_output, *args, **kwargs)


def _dummy_run(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    with _tracker_of(self).suspended():
        return original(self, *args, **kwargs)


def _take_stats(worker: Any) -> dict[str, tuple[int, int]]:
    tracker = steps.tracker()
    return tracker.take_stats() if tracker is not None else {}
