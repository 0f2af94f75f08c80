"""Switches LiteAttention on and off in a pipeline, and follows its generations.

State belongs to a layer, a guidance branch and a generation. The layer is known from a hook around its attention, the
branch from the context that pipelines open on the transformer (`cache_context`), a new generation from the scheduler,
whose timesteps a pipeline sets when it begins. A generation that was broken off leaves nothing to the next.
"""

from __future__ import annotations

import fnmatch
import functools
import inspect
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from lite_attention import LiteAttention
from lite_attention.attention import Threshold
from lite_attention.backend.denoising import Phase, phase, risen, state_at, text_ranges, valid_keys
from lite_attention.backend.diffusers import dispatch
from lite_attention.backend.diffusers.models import FAMILIES, Family, attentions, family_of
from lite_attention.calibration import Calibration, Target, find
from lite_attention.costs import Cost, Meter
from lite_attention.options import RELATIVE_THRESHOLD, Rule, check_heads, check_threshold_rise
from lite_attention.report import Report
from lite_attention.state import SkipState

logger = logging.getLogger(__name__)

HOOK = "lite_attention"
"""Our name in the hook registries of diffusers."""

_ATTRIBUTE = "_lite_attention_session"
"""Of a pipeline, and of its transformers, as long as it is enabled."""


def enable(
    pipeline: DiffusionPipeline,
    threshold: Threshold | None = None,
    *,
    calibration: Calibration | str | Path | None = None,
    rule: Rule | None = None,
    relative: bool = False,
    refresh_interval: int | None = None,
    warmup_steps: int = 0,
    cooldown_steps: int = 0,
    threshold_rise: float = 0.0,
    dense_layers: Iterable[str] = (),
) -> Report:
    """Skip in the long self-attentions of a pipeline from its next generation on.

    Works with CPU offload and with compiled transformers, whose graphs break at these attentions. A pipeline that is
    enabled already gets the new options. Gradients are not supported.

    Args:
        pipeline: with a transformer of `lite_attention.backend.diffusers.models.FAMILIES`, or two of them.
        threshold: log2 of a weight, or one for each row of a batch, or by the denoising step from which on it holds,
            ``{0: -12, 10: -8}``; see `LiteAttention.set_threshold`. None for -8, for -1 where
            relative.
        calibration: what `calibrate` found, or its file, instead of threshold, rule and refresh_interval. A generation
            of another size than it was made for raises ValueError.
        rule: when a block is cleared; see `lite_attention.reference.forward`. None for running_max.
        relative: whether thresholds are relative to 1 / blocks of keys, see `LiteAttention`. Not with running_max, and
            not beside calibration, whose thresholds are for one length.
        refresh_interval: every so many steps all blocks are visited; 0 or None for never.
        warmup_steps: so many steps at the beginning visit everything; the one after them skips.
        cooldown_steps: so many steps at the end are dense.
        threshold_rise: by how much, log2 of a weight, thresholds rise evenly over the steps of a generation, 0 to 16:
            they hold for the first step, the strictest, and reach 0 at most, relative to 1 also where ``relative``. 0
            where thresholds are by step.
        dense_layers: patterns of names of layers (`Report.layers`) that never skip, such as ``*.blocks.0.*``; behind a
            colon some heads of them, ``*.blocks.3.*:0,5``.

    Returns:
        What is skipped, always of the last generation.

    Raises:
        OSError: the calibration's file cannot be read.
        TypeError, ValueError: an option is not what is expected, or the pipeline has no transformer that is known, or
            shares one with a pipeline that is enabled, or has other layers than the calibration.
    """
    given = {"threshold": threshold, "rule": rule, "refresh_interval": refresh_interval}
    given = {name: value for name, value in given.items() if value is not None}
    if relative:
        given["relative"] = relative
    if threshold_rise and isinstance(threshold, Mapping):
        raise ValueError(f"threshold_rise: expected 0 beside thresholds by step, which say it, got {threshold_rise!r}")
    dense = [_parse_dense(pattern) for pattern in _patterns(dense_layers)]
    found: Calibration | None = None
    if calibration is None:
        make = _maker({"threshold": RELATIVE_THRESHOLD if relative else -8.0} | given)
    else:
        for name, value in given.items():
            without = False if name == "relative" else None
            raise ValueError(f"{name}: expected {without} beside calibration, which says it, got {value!r}")
        found = calibration if isinstance(calibration, Calibration) else Calibration.load(calibration)
        make = functools.partial(LiteAttention.from_calibration, found)
    session = _replace_session(pipeline, _leave_dense(make, dense), warmup_steps, cooldown_steps, threshold_rise)
    if found is not None:
        found.check_layers(session.report.layers)
    for pattern, _ in dense:
        if not fnmatch.filter(session.report.layers, pattern):
            known = ", ".join(session.report.layers[:3])
            raise ValueError(f"dense_layers: expected patterns that fit layers ({known}, ...), got {pattern!r}")
    session.install()
    return session.report


def calibrate(
    pipeline: DiffusionPipeline,
    run: Callable[[], object],
    target: str,
    *,
    inputs: str,
    rule: Rule = "running_max",
    refresh_interval: int = 0,
    warmup_steps: int = 0,
    cooldown_steps: int = 0,
    threshold_rise: float = 0.0,
) -> Calibration:
    """Find a threshold for each layer of a pipeline at which skipping costs what is allowed.

    A generation takes as long as a dense and a skipping one together, for each attention is computed twice. Afterwards
    the pipeline has its own attention.

    Args:
        pipeline: as for `enable`.
        run: generates, from the very same noise each time; called `lite_attention.calibration.ROUNDS` times at most.
        target: what each layer's cost is to be, ``error=0.05``, ``dropped=0.01`` or ``sparsity=0.5``; see
            `lite_attention.costs.Cost`.
        inputs: what `run` generates, for the file.
        threshold_rise: as for `enable`, which needs it as well: what is found holds for the first step.

    Raises:
        TypeError, ValueError: as `enable`; or a layer did not skip, or layers have different numbers of tokens.
    """
    wanted = Target.parse(target)
    options: dict[str, Any] = {"rule": rule, "refresh_interval": refresh_interval}
    _maker(options)
    thresholds: Mapping[str, float] = {}

    def costs_at(moved: Mapping[str, float]) -> dict[str, Cost]:
        nonlocal thresholds
        thresholds = moved
        run()
        return {layer: meter.read() for layer, meter in meters.items()}

    def make(layer: str) -> LiteAttention:
        return LiteAttention(thresholds[layer], **options)

    with _metered(pipeline, make, warmup_steps, cooldown_steps, threshold_rise) as meters:
        model = str(pipeline.name_or_path or type(pipeline).__name__)
        return find(costs_at, meters, wanted, model=model, inputs=inputs, **options)


def measure(
    pipeline: DiffusionPipeline,
    run: Callable[[], object],
    calibration: Calibration,
    *,
    warmup_steps: int = 0,
    cooldown_steps: int = 0,
    threshold_rise: float = 0.0,
) -> dict[str, Cost]:
    """What skipping costs each layer of a pipeline in what `run` generates, with the thresholds of a calibration.

    Raises:
        TypeError, ValueError: as `enable`.
    """
    make = functools.partial(LiteAttention.from_calibration, calibration)
    with _metered(pipeline, make, warmup_steps, cooldown_steps, threshold_rise) as meters:
        calibration.check_layers(meters)
        run()
        return {layer: meter.read() for layer, meter in meters.items()}


@contextmanager
def _metered(
    pipeline: DiffusionPipeline,
    make: Callable[[str], LiteAttention],
    warmup_steps: int,
    cooldown_steps: int,
    threshold_rise: float,
) -> Iterator[dict[str, Meter]]:
    """A pipeline whose layers, made by name, are measured."""
    meters: dict[str, Meter] = {}

    def metered(layer: str) -> LiteAttention:
        attention = make(layer)
        attention.meter = meters[layer]
        return attention

    session = _replace_session(pipeline, metered, warmup_steps, cooldown_steps, threshold_rise)
    meters.update((layer, Meter()) for layer in session.report.layers)
    session.install()
    try:
        yield meters
    finally:
        disable(pipeline)


def _maker(options: dict[str, Any]) -> Callable[[str], LiteAttention]:
    """Makes the same attention for every layer. An option that is not right is an error now, not in the first step."""
    LiteAttention(**options)
    return lambda _layer: LiteAttention(**options)


def _patterns(dense_layers: Iterable[str]) -> list[str]:
    if isinstance(dense_layers, str):
        raise TypeError(f"dense_layers: expected a list of patterns, got the string {dense_layers!r}")
    return list(dense_layers)


def _parse_dense(text: str) -> tuple[str, tuple[int, ...] | None]:
    """A pattern of layers, and those of their heads that are left dense; None for all."""
    pattern, colon, heads = text.partition(":")
    try:
        return pattern, check_heads(map(int, heads.split(","))) if colon else None
    except ValueError:
        raise ValueError(f"dense_layers: expected numbers of heads behind the colon, got {text!r}") from None


def _leave_dense(
    make: Callable[[str], LiteAttention], dense: list[tuple[str, tuple[int, ...] | None]]
) -> Callable[[str], LiteAttention]:
    """As ``make``, but layers that fit a pattern do not skip, or some heads of them do not."""

    def made(layer: str) -> LiteAttention:
        attention = make(layer)
        fitting = [heads for pattern, heads in dense if fnmatch.fnmatchcase(layer, pattern)]
        if None in fitting:
            attention.enable_skip_optimization(False)
        attention.dense_heads = check_heads(head for heads in fitting for head in heads or ())
        return attention

    return made


def _replace_session(
    pipeline: DiffusionPipeline,
    make: Callable[[str], LiteAttention],
    warmup_steps: int,
    cooldown_steps: int,
    threshold_rise: float,
) -> _Session:
    """A session, not installed yet, in place of any that is; for the options see `enable`."""
    for name, steps in (("warmup_steps", warmup_steps), ("cooldown_steps", cooldown_steps)):
        if isinstance(steps, bool) or not isinstance(steps, int):
            raise TypeError(f"{name}: expected an int, got {type(steps).__name__} {steps!r}")
        if steps < 0:
            raise ValueError(f"{name}: expected 0 or more, got {steps}")
    rise = check_threshold_rise(threshold_rise)
    disable(pipeline)
    return _Session(pipeline, make, warmup_steps, cooldown_steps, rise)


def disable(pipeline: DiffusionPipeline) -> None:
    """Give a pipeline its own attention back; nothing happens where it has it."""
    session = getattr(pipeline, _ATTRIBUTE, None)
    if session is not None:
        session.remove()


@contextmanager
def skipping(pipeline: DiffusionPipeline, threshold: Threshold | None = None, **options: Any) -> Iterator[Report]:
    """`enable` for the length of a `with` statement."""
    report = enable(pipeline, threshold, **options)
    try:
        yield report
    finally:
        disable(pipeline)


class _Layer(ModelHook):
    """Around an attention module: computes what its processor asks for.

    Attributes:
        name: of the transformer and the module.
        stock: the attention backend that the processor named before, None for the default.
        attentions: the state of each branch, and the step at which it was last used.
        threshold: of the first step, of all branches.
    """

    def __init__(self, name: str, transformer: _Transformer) -> None:
        super().__init__()
        self.name = name
        self.transformer = transformer
        self.stock: Any = None
        self.attentions: dict[str, tuple[LiteAttention, int]] = {}
        self.threshold: Any = None

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        parallel_config: Any = None,
    ) -> Tensor:
        """See `dispatch.Attend`."""
        step = self.transformer.step
        keys = key.shape[1] if attn_mask is None else self.transformer.valid_keys(attn_mask)
        reason = self.transformer.reason
        if is_causal or dropout_p or parallel_config is not None:
            reason = "attention is causal, drops out or is spread over GPUs"
        elif keys is None:
            reason = "an attention mask hides other keys than the last ones"
        now = self.transformer.phase()
        attention = self._attention(step) if reason is None and now != "dense" else None
        if attention is not None and attention.enable_skipping:
            assert keys is not None
            attention.step = step
            transformer = self.transformer
            ranges = text_ranges(transformer.family.text, transformer.text_tokens, key.shape[1], keys)
            learns = now == "learn"
            out = attention(query, key[:, :keys], value[:, :keys], scale, visit_all=learns, must_visit=ranges)
            self._note(step, attention.sparsity_tensor, attention.skip_state)
            return out
        if reason is not None:
            self.transformer.session.dense(reason)
        self._note(step, 0.0)
        options = (attn_mask, dropout_p, is_causal, scale, enable_gqa)
        return dispatch_attention_fn(query, key, value, *options, backend=self.stock, parallel_config=parallel_config)

    def _attention(self, step: int) -> LiteAttention:
        """This branch's state, without what is too old, with the threshold of this step."""
        branch, session = self.transformer.branch, self.transformer.session
        assert branch is not None
        attention = state_at(self.attentions, branch, step, self._make)
        if session.threshold_rise:
            rise, steps = session.threshold_rise, session.total_steps
            attention.threshold = risen(self.threshold, rise, step, steps, attention.relative)
        return attention

    def _make(self) -> LiteAttention:
        attention = self.transformer.session.make(self.name)
        self.threshold = attention.threshold
        return attention

    def _note(self, step: int, share: Tensor | float | None, state: SkipState | None = None) -> None:
        branch = self.transformer.branch or "no branch"
        self.transformer.session.report.add(self.name, branch, step, 0.0 if share is None else share, state)


class _BackendLayer(_Layer):
    """Around an attention module whose processor names a backend: as long as the hook is there, ours."""

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        self.stock = module.processor._attention_backend  # type: ignore[union-attr]
        module.processor._attention_backend = dispatch.register()  # type: ignore[union-attr]
        return module

    def deinitalize_hook(self, module: nn.Module) -> nn.Module:
        module.processor._attention_backend = self.stock  # type: ignore[union-attr]
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._announce()
        return args, kwargs

    @torch.compiler.disable
    def _announce(self) -> None:
        dispatch.set_attend(self.attend)


class _TorchLayer(_Layer):
    """Around an attention module whose processor calls PyTorch's attention."""

    @torch.compiler.disable
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, its attention computed by us."""
        with dispatch.InsteadOfTorch(self.attend):
            return self.fn_ref.original_forward(*args, **kwargs)


class _Transformer:
    """Follows a transformer: which step of which branch it computes.

    It stays out of diffusers' registry of hooks, which replaces `forward`: CPU offload does so too, at the end of each
    generation, and the one would throw out the other.

    Attributes:
        branch: what the pipeline calls the guidance branch; None if it does not say.
        step: of the generation and the branch, from 0.
    """

    def __init__(self, name: str, module: nn.Module, family: Family, session: _Session) -> None:
        self.module = module
        self.family = family
        self.session = session
        self.signature = inspect.signature(type(module).forward)
        self.branch: str | None = None
        self.step = 0
        self.text_tokens = 0
        self.layers: dict[nn.Module, _Layer] = {}
        make = _BackendLayer if family.chooses_backend else _TorchLayer
        for layer, attention in attentions(module, family).items():
            self.layers[attention] = make(f"{name}.{layer}", self)
        self._mask: tuple[Tensor, int | None] | None = None

    def install(self) -> None:
        """Follow the module from now on, and compute its long attentions."""
        module: Any = self.module
        cache_context, reset_cache = module.cache_context, module._reset_stateful_cache

        @contextmanager
        def named(name: str) -> Iterator[None]:
            before, self.branch = self.branch, name
            try:
                with cache_context(name):
                    yield
            finally:
                self.branch = before

        def reset(*args: Any, **kwargs: Any) -> None:
            reset_cache(*args, **kwargs)
            self.reset_state()

        module.cache_context, module._reset_stateful_cache = named, reset
        self._handle = module.register_forward_pre_hook(self._begin, with_kwargs=True)
        setattr(module, _ATTRIBUTE, self.session)
        for attention, layer in self.layers.items():
            HookRegistry.check_if_exists_or_initialize(attention).register_hook(layer, HOOK)

    def remove(self) -> None:
        """The opposite of `install`."""
        module: Any = self.module
        for name in ("cache_context", "_reset_stateful_cache", _ATTRIBUTE):
            delattr(module, name)
        self._handle.remove()
        self.reset_state()
        for attention in self.layers:
            attention._diffusers_hook.remove_hook(HOOK, recurse=False)  # type: ignore[union-attr,operator]

    @property
    def reason(self) -> str | None:
        """Why this transformer cannot skip now; None if it can."""
        return "the pipeline does not say which guidance branch it computes" if self.branch is None else None

    def phase(self) -> Phase:
        """What this step does, by where it lies between warm-up and cool-down."""
        session = self.session
        return phase(self.step, session.total_steps, session.warmup_steps, session.cooldown_steps)

    def valid_keys(self, mask: Tensor) -> int | None:
        """How many keys, the first ones, a mask lets every query see; None if it is no such mask.

        All layers of a call get the same mask, so the device is waited for once a call.
        """
        if self._mask is None or self._mask[0] is not mask:
            self._mask = mask, valid_keys(mask)
        return self._mask[1]

    @torch.compiler.disable
    def _begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.session.follow_scheduler()
        self.step = self.session.steps[self.branch]
        self.session.steps[self.branch] += 1
        self._mask = None
        if self.family.text != "none":
            arguments = self.signature.bind_partial(self.module, *args, **kwargs).arguments
            text = arguments.get("encoder_hidden_states")
            self.text_tokens = text.shape[1] if isinstance(text, Tensor) else 0

    def reset_state(self) -> None:
        """The generation is over."""
        self._mask = None
        for layer in self.layers.values():
            layer.attentions.clear()


class _Session:
    """LiteAttention in one pipeline.

    Attributes:
        make: makes the attention of a layer, by its name.
        steps: that a generation has begun, by branch, over all transformers.
        total_steps: of the generation.
        threshold_rise: see `enable`.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        make: Callable[[str], LiteAttention],
        warmup_steps: int,
        cooldown_steps: int,
        threshold_rise: float,
    ) -> None:
        self.pipeline = pipeline
        self.make = make
        self.warmup_steps = warmup_steps
        self.cooldown_steps = cooldown_steps
        self.threshold_rise = threshold_rise
        self.steps: defaultdict[str | None, int] = defaultdict(int)
        self.total_steps = 0
        self.transformers = self._transformers()
        layers = [layer.name for hook in self.transformers for layer in hook.layers.values()]
        self.report = Report(layers, title=str(pipeline.name_or_path or type(pipeline).__name__))
        self._scheduler: Any = None

    def _transformers(self) -> list[_Transformer]:
        found = []
        for name, component in self.pipeline.components.items():
            module = getattr(component, "_orig_mod", component)  # of a compiled one
            family = family_of(module) if isinstance(module, nn.Module) else None
            if family is None:
                continue
            if hasattr(module, _ATTRIBUTE):
                raise ValueError(f"pipeline: expected a {name} of its own, got one that is enabled in another pipeline")
            found.append(_Transformer(name, module, family, self))
        if not found:
            got = type(self.pipeline).__name__
            raise ValueError(f"pipeline: expected one with a transformer of {', '.join(FAMILIES)}, got {got}")
        return found

    def install(self) -> None:
        for transformer in self.transformers:
            transformer.install()
        self.follow_scheduler()
        setattr(self.pipeline, _ATTRIBUTE, self)
        torch.compiler.reset()

    def remove(self) -> None:
        for transformer in self.transformers:
            transformer.remove()
        self._leave_scheduler()
        delattr(self.pipeline, _ATTRIBUTE)
        torch.compiler.reset()

    def follow_scheduler(self) -> None:
        """Learn when the pipeline's scheduler, which users may have replaced, begins a generation."""
        scheduler = self.pipeline.scheduler
        if scheduler is self._scheduler:
            return
        self._leave_scheduler()
        self._scheduler = scheduler
        set_timesteps = scheduler.set_timesteps

        @functools.wraps(set_timesteps)
        def wrapped(*args: Any, **kwargs: Any) -> None:
            set_timesteps(*args, **kwargs)
            self._start()

        scheduler.set_timesteps = wrapped
        self._start()

    def _leave_scheduler(self) -> None:
        if self._scheduler is not None:
            del self._scheduler.set_timesteps
            self._scheduler = None

    def _start(self) -> None:
        """A generation begins."""
        timesteps = getattr(self.pipeline.scheduler, "timesteps", None)
        self.total_steps = len(timesteps) if timesteps is not None else 0
        self.steps.clear()
        self.report.clear()
        for transformer in self.transformers:
            transformer.reset_state()

    def dense(self, reason: str) -> None:
        """Attention is dense where skipping was asked for; said once a generation in the report, once in the log."""
        if reason not in self.report.reasons:
            self.report.reasons.add(reason)
            _log_once(reason)


@functools.cache
def _log_once(reason: str) -> None:
    logger.warning("LiteAttention cannot act: %s. Attention is dense there.", reason)
