"""The requests that a runner executes together: their options, their skip states, and what they skipped.

State belongs to a request, a guidance branch and a layer, and ends with the execution, also with one that fails or is
aborted: its memory goes back to a pool. The branch is known from the embedding of the prompt that the transformer is
called with, the step from the forward context of the pipelines that set it, else by counting the branch's calls.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm_omni.diffusion.forward_context import get_forward_context, is_forward_context_available

from lite_attention import ops
from lite_attention.backend.denoising import phase, risen, state_at, text_ranges, valid_keys
from lite_attention.backend.omni.models import Family, conditioning, family_of
from lite_attention.backend.omni.pool import PooledAttention, StatePool
from lite_attention.calibration import Calibration
from lite_attention.options import Rule
from lite_attention.ranges import Range
from lite_attention.serving.params import CONFIG_KEY, DenoiseOptions, LiteParamError
from lite_attention.tiles import BLOCK_K, TILE_Q, ceil_div

if TYPE_CHECKING:
    from lite_attention.backend.omni.attention import LiteAttentionImpl

logger = init_logger("vllm.lite_attn")

MAX_BRANCHES = 8
"""More embeddings of prompts than this in one execution, and they are no sign of the branch: new ones at each step."""

_HIDES_OTHERS = "an attention mask hides other keys than the last ones"

Census = dict[Any, str | None]
"""By attention layer, why it stays on stock attention; None where it can skip."""

_local = threading.local()


@dataclass
class Request:
    """One request of an execution.

    Attributes:
        rows: how many rows of a batch are its own.
        rule: by which its layers skip.
        relative: whether its thresholds are relative to 1 / blocks.
        profile: thresholds of the layers; None where the options' is that of all.
        refusal: why it cannot be served, found out while it was executed.
        states: by branch and layer, with the step at which each was last used.
        visited, total: (query tile, key block) pairs, over all layers, branches and steps.
    """

    request_id: str
    options: DenoiseOptions
    rows: int
    rule: Rule = "running_max"
    relative: bool = False
    profile: Calibration | None = None
    refusal: LiteParamError | None = None
    states: dict[tuple[int, int], tuple[PooledAttention, int]] = field(default_factory=dict)
    visited: Tensor | float = 0.0
    total: int = 0

    def threshold(self, layer: str) -> float:
        """The threshold of a layer, by its name, at the first step."""
        return self.options.threshold if self.profile is None else self.profile.thresholds[layer]

    def make(self, pool: StatePool, layer: str) -> PooledAttention:
        """The state of a layer, by its name."""
        return PooledAttention(
            pool,
            self.threshold(layer),
            rule=self.rule,
            relative=self.relative,
            refresh_interval=self.options.refresh_interval,
        )

    def check_keys(self, keys: int) -> None:
        """Note a refusal unless attention to so many keys is what the profile was made for."""
        if self.profile is not None and keys != self.profile.shape.tokens:
            name = f"{CONFIG_KEY}.profile"
            wanted = f"one for the {keys:,} keys of this video or picture"
            self.refusal = LiteParamError(
                f"{name}: expected {wanted}, got {self.options.profile!r}, made for {self.profile.shape.tokens:,}", name
            )

    def release(self) -> None:
        """Give all states back."""
        for attention, _ in self.states.values():
            attention.release()
        self.states.clear()

    def count(self, query: Tensor, keys: int, share: Tensor | float | None) -> None:
        """Note which share of the pairs of an attention was skipped; a tensor stays on its device."""
        rows, tokens, heads, _ = query.shape
        pairs = rows * heads * ceil_div(tokens, TILE_Q) * ceil_div(keys, BLOCK_K)
        self.total += pairs
        self.visited = self.visited + (1.0 - (0.0 if share is None else share)) * pairs


@dataclass
class _Call:
    """A call of a transformer: which step of which branch it computes, and where its text tokens stand."""

    branch: int
    step: int
    family: Family
    arguments: Mapping[str, Any]
    transformer: nn.Module
    keys: dict[int, tuple[Tensor, int | None]] = field(default_factory=dict)

    def valid_keys(self, place: int, mask: Tensor) -> int | None:
        """See `denoising.valid_keys`. All layers of a call get the same mask: the device is waited for once."""
        known = self.keys.get(place)
        if known is None or known[0].data_ptr() != mask.data_ptr() or known[0].shape != mask.shape:
            known = self.keys[place] = mask, valid_keys(mask)
        return known[1]

    def text_ranges(self, tokens: int, keys: int) -> list[Range]:
        """Keys of the prompt."""
        if self.family.text == "end":
            text = tokens - self.family.picture_tokens(self.transformer, self.arguments)
        else:
            text = self.arguments["encoder_hidden_states"].shape[1]
        return text_ranges(self.family.text, text, tokens, keys)


class Execution:
    """The requests that one call of a runner executes.

    Args:
        pipeline: of the runner.
        requests: in the order of their rows in a batch.
        pool: of their states.
        census: where to note of each layer why it stays on stock attention, None if it can skip; None to note nothing.
    """

    def __init__(self, pipeline: Any, requests: list[Request], pool: StatePool, census: Census | None = None) -> None:
        self.pipeline = pipeline
        self.requests = requests
        self.pool = pool
        self.census = census
        self.skips = any(request.options.skips for request in requests)
        self._call: _Call | None = None
        self._conditionings: list[Tensor] = []  # kept, so that no other tensor gets their addresses
        self._calls: defaultdict[int, int] = defaultdict(int)

    def begin_call(self, transformer: nn.Module, family: Family, arguments: Mapping[str, Any]) -> None:
        """A transformer is called."""
        branch = self._branch(conditioning(arguments))
        if branch is None:
            return
        step = _context("denoise_step_idx")
        self._call = _Call(branch, self._calls[branch] if step is None else step, family, arguments, transformer)
        self._calls[branch] += 1

    def end_call(self) -> None:
        """The transformer's call is over."""
        self._call = None

    def attend(
        self, layer: LiteAttentionImpl, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Attention of one layer, tensors (batch, tokens, heads, head_dim); `mask` as the stock backend takes it.

        Raises:
            LiteParamError: all requests are refused. Those beside others are dense, so that nobody notices them.
        """
        call = self._call
        rows = [request.rows for request in self.requests] if len(self.requests) > 1 else [query.shape[0]]
        reason = self._obstacle(rows, query, key, value) if self.skips or self.census is not None else None
        if self.census is not None:
            self.census[layer] = reason or (None if mask is None or valid_keys(mask) else _HIDES_OTHERS)
        if call is None or reason is not None or not self.skips:
            say_once(reason if self.skips else None)
            return layer.dense(query, key, value, mask)
        parts = []
        start = 0
        for place, (request, count) in enumerate(zip(self.requests, rows, strict=True)):
            # Each request by itself: what it skips cannot depend on what it is batched with.
            row = slice(start, start + count)
            part = None if mask is None else mask[row] if mask.shape[0] == query.shape[0] else mask
            parts.append(self._attend(place, request, call, layer, query[row], key[row], value[row], part))
            start += count
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _obstacle(self, rows: list[int], query: Tensor, key: Tensor, value: Tensor) -> str | None:
        """Why an attention of this call cannot skip; `rows` of each request."""
        if self._call is None:
            return "the guidance branch of a call of the transformer is not known"
        if self._call.family.text != "none" and _sequence_parallel():
            return "under sequence parallelism it is not known where the prompt's tokens stand"
        if sum(rows) != query.shape[0]:
            return "the rows of a batch are not those of its requests"
        return _no_skipping(query, key, value)

    def _attend(
        self,
        place: int,
        request: Request,
        call: _Call,
        layer: LiteAttentionImpl,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        """One request's rows."""
        options = request.options
        if not options.skips:
            return layer.dense(query, key, value, mask)
        keys = key.shape[1] if mask is None else call.valid_keys(place, mask)
        if keys:
            request.check_keys(keys)
        if request.refusal is not None:
            if all(other.refusal is not None for other in self.requests):
                raise request.refusal
            return layer.dense(query, key, value, mask)
        counts = options.warmup_steps or options.cooldown_steps or options.threshold_rise
        total = self._total_steps() if counts else None
        reason = None
        if not keys:
            reason = _HIDES_OTHERS
        elif total is None and (options.cooldown_steps or options.threshold_rise):
            reason = "the pipeline does not say how many steps it takes, which cooldown_steps and threshold_rise need"
        now = phase(call.step, total, options.warmup_steps, options.cooldown_steps)
        if reason is not None or not keys or now == "dense":
            say_once(reason)
            request.count(query, key.shape[1], 0.0)
            return layer.dense(query, key, value, mask)
        make = functools.partial(request.make, self.pool, layer.name)
        attention = state_at(request.states, (call.branch, layer.number), call.step, make)
        if total is not None and options.threshold_rise:
            first, rise = request.threshold(layer.name), options.threshold_rise
            attention.threshold = risen(first, rise, call.step, total, request.relative)
        ranges = call.text_ranges(key.shape[1], keys)
        key, value, learns = key[:, :keys], value[:, :keys], now == "learn"
        out: Tensor = attention(query, key, value, layer.scale, visit_all=learns, must_visit=ranges)
        request.count(query, keys, attention.sparsity_tensor)
        return out

    def _branch(self, tensor: Tensor | None) -> int | None:
        """The number of the branch that is computed with this embedding; None if that cannot be said."""
        if tensor is None:
            return None
        for number, known in enumerate(self._conditionings):
            same = (known.data_ptr(), known.shape, known.stride()) == (tensor.data_ptr(), tensor.shape, tensor.stride())
            if known is tensor or same:
                return number
        if len(self._conditionings) == MAX_BRANCHES:
            return None
        self._conditionings.append(tensor)
        return len(self._conditionings) - 1

    def _total_steps(self) -> int | None:
        total = _context("total_denoise_steps")
        if total is not None:
            return int(total)
        timesteps = getattr(getattr(self.pipeline, "scheduler", None), "timesteps", None)
        return len(timesteps) if timesteps is not None else None


def current() -> Execution | None:
    """The execution of this thread."""
    return getattr(_local, "execution", None)


@contextmanager
def executing(pipeline: Any, requests: list[Request], pool: StatePool) -> Iterator[None]:
    """Requests are executed by this thread; their states end with them, however they end.

    The pool keeps as much memory as they used.
    """
    census = _attach(pipeline)
    before, _local.execution = current(), Execution(pipeline, requests, pool, census)
    try:
        yield
    finally:
        _local.execution = before
        for request in requests:
            request.release()
        pool.trim()
        if census is not None:
            _say_census(pipeline, census)


@functools.cache
def say_once(reason: str | None) -> None:
    """Say, the first time, why attention is dense where skipping was asked for."""
    if reason is not None:
        logger.warning("LITE_ATTN cannot act: %s. Attention is dense there.", reason)


def _no_skipping(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    try:
        ops.check_inputs(query, key, value)
    except (TypeError, ValueError) as error:
        return str(error)
    return ops.unsupported("forward", query)


def _context(name: str) -> Any:
    return getattr(get_forward_context(), name, None) if is_forward_context_available() else None


def _sequence_parallel() -> bool:
    config = _context("omni_diffusion_config")
    return config is not None and (config.parallel_config.sequence_parallel_size or 1) > 1


_ATTACHED = "_lite_attn_attached"


def uses_lite_attention(pipeline: Any) -> bool:
    """Whether a pipeline has an attention layer that is ours."""
    return any(_implementation(module) is not None for module in pipeline.modules())


def _implementation(module: nn.Module) -> LiteAttentionImpl | None:
    """Our implementation of an attention layer of vLLM-Omni; None for other modules."""
    from lite_attention.backend.omni.attention import LiteAttentionImpl

    found = getattr(module, "attention", None)
    return found if isinstance(found, LiteAttentionImpl) else None


def long_layers(pipeline: Any) -> dict[str, LiteAttentionImpl]:
    """Our implementations in the long self-attentions of a pipeline, by the names that calibrations have for them."""
    found: dict[str, LiteAttentionImpl] = {}
    for place, transformer in pipeline.named_modules():
        family = family_of(transformer)
        if family is None:
            continue
        for name, module in transformer.named_modules():
            layer = _implementation(module)
            if layer is not None and family.layers.fullmatch(name):
                # vLLM-Omni's module, .attn, in the one that has this name in diffusers.
                found[f"{place}.{name.removesuffix('.attn')}"] = layer
    return found


def _attach(pipeline: Any) -> Census | None:
    """Hook the transformers of a pipeline, and tell their long attentions that they may skip. Idempotent.

    Returns:
        What can be said of its attention layers now, the first time; then None.
    """
    from vllm_omni.diffusion.attention.layer import Attention

    if getattr(pipeline, _ATTACHED, False):
        return None
    for transformer in pipeline.modules():
        family = family_of(transformer)
        if family is not None:
            _hook(transformer, family)
    long = long_layers(pipeline)
    for name, layer in long.items():
        layer.name, layer.is_long = name, True
    if not long:
        say_once(f"{type(pipeline).__name__} has no transformer that it knows")
    census: Census = {}
    for module in pipeline.modules():
        impl = _implementation(module)
        if impl is not None:
            census[impl] = impl.reason if impl.is_long else "no long self-attention of a transformer that it knows"
        elif isinstance(module, Attention):
            census[module] = "another backend was asked for"
    setattr(pipeline, _ATTACHED, True)
    return census


def _say_census(pipeline: Any, census: Census) -> None:
    stock = Counter(reason for reason in census.values() if reason is not None)
    reasons = "".join(f"; {count} on stock attention ({reason})" for reason, count in stock.most_common())
    name = type(pipeline).__name__
    logger.info("LITE_ATTN acts on %d attention layers of %s%s", len(census) - stock.total(), name, reasons)


def _hook(transformer: nn.Module, family: Family) -> None:
    signature = inspect.signature(transformer.forward)

    @torch.compiler.disable
    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        execution = current()
        if execution is not None:
            execution.begin_call(module, family, signature.bind_partial(*args, **kwargs).arguments)

    @torch.compiler.disable
    def end(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        execution = current()
        if execution is not None:
            execution.end_call()

    transformer.register_forward_pre_hook(begin, with_kwargs=True)
    transformer.register_forward_hook(end, always_call=True)
