"""Attention modules for denoising models: drop-in attention that carries a skip state from step to step."""

from __future__ import annotations

import functools
import logging
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from lite_attention import ops
from lite_attention.costs import Meter, Shape
from lite_attention.options import (
    LEARNING_STEPS,
    Rule,
    check_heads,
    check_refresh_interval,
    check_relative,
    check_rule,
    check_schedule,
    normalize_threshold,
)
from lite_attention.ranges import Range, check_ranges, forced_words, from_flat_list
from lite_attention.state import SkipState
from lite_attention.tiles import BLOCK_K, TILE_Q, ceil_div

if TYPE_CHECKING:
    from lite_attention.calibration import Calibration

logger = logging.getLogger(__name__)

Threshold = float | Tensor | Sequence[float] | Mapping[int, float]
Ranges = Iterable[Range] | None
Numbers = TypeVar("Numbers", float, Tensor)


class LiteAttention(nn.Module):
    """Attention of one layer that skips key blocks which mattered little in earlier steps.

    Use one instance a layer, call it once a denoising step and reset it between videos. The state starts anew
    whenever batch, heads, tokens, dtype or device change; it is no part of the ``state_dict``. Inference
    only.

    Where ``lite_attention::forward`` cannot run (on other devices than CPUs and Hopper GPUs, in float32 on GPUs),
    attention is dense (PyTorch's own), which is said once in a warning with the reason.

    Attributes:
        threshold: log2 of a weight, at most 0 (see `lite_attention.reference.forward`), -inf for no skipping;
            or float32 (batch,); or by step, see `set_threshold`; None until set.
        relative: whether it is relative to 1 / blocks, the share of each block of keys in a uniform softmax.
        step: of the next call, counted from the last reset. Set it where a model leaves calls out.
        dense_heads: query heads that visit everything.
        enable_skipping: whether calls skip; where not, attention is dense and the state stays as it is.
        meter: measures what skipping costs, computing each call a second time, dense; None for not.
    """

    def __init__(
        self,
        threshold: Threshold | None = -10.0,
        *,
        rule: Rule = "running_max",
        relative: bool = False,
        refresh_interval: int = 0,
        dense_heads: Iterable[int] = (),
        enable_skipping: bool = True,
        max_batch_size: int | None = None,
        reverse_skip_list: bool = True,
        use_int8: bool = False,
    ) -> None:
        """An attention layer without state yet.

        Args:
            threshold: as in `set_threshold`; None to set it later.
            rule: when a block is cleared, ``running_max`` or ``mass``, and ``mass_summaries``, which has summaries
                stand in for blocks that are skipped; see `lite_attention.reference.forward`.
            relative: whether thresholds are relative to 1 / blocks, with blocks of 64 keys, so that they mean about
                the same at every length: ``threshold - log2(blocks)`` is used, but at most 0. -1 is where to begin,
                -8.6 at 12,544 keys. Not with running_max.
            refresh_interval: every so many steps all blocks are visited; 0 for never.
            dense_heads: query heads that are to visit everything.
            enable_skipping: as in `enable_skip_optimization`.
            max_batch_size: accepted for published code; there is no limit.
            reverse_skip_list: accepted for published code; forced lists are understood in both orders.
            use_int8: must be False.

        Raises:
            TypeError, ValueError: an option is not what is expected.
        """
        super().__init__()
        if use_int8:
            raise ValueError("use_int8: expected False (int8 is not supported), got True")
        self.threshold: float | Tensor | dict[int, float] | None = None
        if threshold is not None:
            self.set_threshold(threshold)
        self.rule = check_rule(rule)
        self.relative = check_relative(relative, self.rule)
        self.refresh_interval = check_refresh_interval(refresh_interval)
        self.dense_heads = check_heads(dense_heads)
        self.step = 0
        self.enable_skipping = bool(enable_skipping)
        self._state: SkipState | None = None
        self._state_key: tuple[object, ...] = ()
        self._steps = 0
        self._visited: tuple[Tensor, int] | float | None = None  # pairs of the last call, of so many; 0.0: dense
        self._forced_key: tuple[object, ...] = ()
        self._forced: tuple[Tensor | None, Tensor | None] = (None, None)
        self.meter: Meter | None = None
        self._calibration: Calibration | None = None

    @classmethod
    def from_calibration(cls, calibration: Calibration | str | Path, layer: str) -> Self:
        """A layer with the threshold, rule and refresh interval that `lite-attention calibrate` found.

        Args:
            calibration: or its file.
            layer: the layer's name in it.

        Raises:
            OSError, ValueError: the file cannot be read, is no calibration, or knows no such layer. Calls whose keys,
                heads or head_dim are others than the calibration was made for raise ValueError, too.
        """
        from lite_attention.calibration import Calibration

        if not isinstance(calibration, Calibration):
            calibration = Calibration.load(calibration)
        if layer not in calibration.thresholds:
            known = ", ".join(list(calibration.thresholds)[:3])
            raise ValueError(f"layer: expected one that the calibration knows ({known}, ...), got {layer!r}")
        attention = cls(
            calibration.thresholds[layer], rule=calibration.rule, refresh_interval=calibration.refresh_interval
        )
        attention._calibration = calibration
        return attention

    @torch.compiler.disable
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None = None,
        *,
        return_softmax_lse: bool = False,
        visit_all: bool = False,
        must_do_list: Sequence[int] | None = None,
        must_skip_list: Sequence[int] | None = None,
        must_visit: Ranges = None,
        must_skip: Ranges = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of one step.

        Args:
            query: (batch, tokens_q, heads, head_dim), float32, bfloat16 or float16.
            key: (batch, tokens_k, kv_heads, head_dim); heads is a multiple of kv_heads.
            value: shape of ``key``.
            scale: factor of q·k; None for ``head_dim ** -0.5``.
            return_softmax_lse: whether to return the log-sum-exp as well.
            visit_all: whether to visit every block, but for ``must_skip``, and decide all the same what the next step
                visits: at the end of a warm-up, whose last `LEARNING_STEPS` steps are enough.
            must_do_list: ``must_visit`` in a published flat format, ``[start_0, end_0, start_1, end_1,
                ...]``, descending or ascending.
            must_skip_list: ``must_skip`` in that format.
            must_visit: token ranges ``(start, end)``, half-open; blocks that overlap one are never skipped.
            must_skip: token ranges; blocks wholly inside them are never visited.

        Returns:
            Output, shape and dtype of ``query``; with ``return_softmax_lse`` also the log-sum-exp of the
            visited scores, and of the estimates of ``mass_summaries``, float32 (batch, heads, tokens_q), natural log.

        Raises:
            TypeError, ValueError: a tensor or range is not what is expected.
            RuntimeError: no threshold is set, or a gradient is asked for.
        """
        ops.check_inputs(query, key, value)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
            raise RuntimeError(
                "LiteAttention is for inference only: expected inputs without gradient, or torch.no_grad()"
            )
        tokens = key.shape[1]
        forced = self._forced_words(
            _ranges(must_visit, must_do_list, tokens, "must_visit", "must_do_list"),
            _ranges(must_skip, must_skip_list, tokens, "must_skip", "must_skip_list"),
            tokens,
            query.device,
        )
        scale = query.shape[3] ** -0.5 if scale is None else scale
        if reason := ops.unsupported("forward", query):
            _warn_dense(reason)
            self._visited = 0.0
            out = _dense(query, key, value, scale)
            return (out, _dense_lse(query, key, scale)) if return_softmax_lse else out
        out, lse = self._attend(query, key, value, scale, visit_all, *forced)
        return (out, lse) if return_softmax_lse else out

    def set_threshold(self, threshold: Threshold) -> None:
        """Set the threshold: log2 of a weight; 10 means -10, and -inf never skips.

        Args:
            threshold: a number; or a tensor (batch,), list or tuple with one for each sequence of the batch; or, by
                the step from which on it holds, a number each: ``{0: -12, 10: -8}``. Steps before the first of these
                are dense. Of dense steps, the last `LEARNING_STEPS` before one that skips decide what that visits.

        Raises:
            TypeError, ValueError: it is something else, NaN or +inf.
        """
        if isinstance(threshold, Tensor):
            if threshold.dim() != 1:
                shape = tuple(threshold.shape)
                raise ValueError(f"threshold: expected a number or shape (batch,), got shape {shape}")
            numbers = [normalize_threshold(number) for number in threshold.tolist()]
            self.threshold = torch.tensor(numbers, dtype=torch.float32, device=threshold.device)
        elif isinstance(threshold, Mapping):
            self.threshold = check_schedule(threshold)
        elif isinstance(threshold, list | tuple):
            numbers = [normalize_threshold(number) for number in threshold]
            self.threshold = torch.tensor(numbers, dtype=torch.float32, device="cpu")
        else:
            self.threshold = normalize_threshold(threshold)

    def enable_skip_optimization(self, enable: bool = True) -> None:
        """Skip from the next call on, or attend densely and leave the state as it is."""
        self.enable_skipping = bool(enable)

    def reset_skip_state(self) -> None:
        """Forget the skip state, as between two videos: the next step visits every block."""
        self._steps = self.step = 0
        self._visited = None
        if self._state is not None:
            self._state.reset()

    @property
    def skip_state(self) -> SkipState | None:
        """The state as the last step left it; None before the first step that skips."""
        return self._state

    @property
    def sparsity(self) -> float | None:
        """Share of (tile, block) pairs that the last call skipped: 0 if dense, None before any call."""
        share = self.sparsity_tensor
        return None if share is None else float(share)

    @property
    def sparsity_tensor(self) -> Tensor | float | None:
        """As ``sparsity``, without waiting for the device: a scalar tensor where it has to be waited for."""
        if not isinstance(self._visited, tuple):
            return self._visited
        visited, pairs = self._visited
        return 1.0 - visited.double() / pairs

    def extra_repr(self) -> str:
        """Options, for ``print``."""
        relative = ", relative=True" if self.relative else ""
        return f"threshold={self.threshold}, rule={self.rule!r}{relative}, refresh_interval={self.refresh_interval}"

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        visit_all: bool,
        must_visit: Tensor | None,
        must_skip: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        if self.enable_skipping and self.threshold is None:
            raise RuntimeError("LiteAttention has no threshold: expected set_threshold(...) before the first call")
        threshold, learns = self._threshold_now(query, key)
        self.step += 1
        if not self.enable_skipping or (isinstance(threshold, float) and threshold == -math.inf):
            self._visited = 0.0
            return ops.forward(query, key, value, None, None, None, None, None, scale, False, self.rule)
        shape = Shape(tokens=key.shape[1], heads=query.shape[2], head_dim=query.shape[3])
        if self._calibration is not None and shape != self._calibration.shape:
            raise ValueError(
                f"query, key: expected {self._calibration.shape}, as the calibration was made for, got {shape}"
            )
        thresholds = self._thresholds(threshold, query, key)
        state = self._state_for(query, key)
        learns = learns or visit_all
        if learns:
            self._steps = 0
        if learns or (self.refresh_interval and self._steps % self.refresh_interval == 0):
            state.refresh()
        elif self.dense_heads:
            state.refresh(self._checked_heads(query.shape[2]))
        self._steps += 1
        visited = torch.empty((), dtype=torch.int64, device=query.device)
        self._visited = (visited, state.pairs) if state.pairs else 0.0
        before = state.mask.clone() if self.meter is not None and self.rule == "mass_summaries" else None
        out, lse = ops.forward(
            query,
            key,
            value,
            state.mask,
            state.lse,
            thresholds,
            must_visit,
            must_skip,
            scale,
            False,
            self.rule,
            pairs_visited=visited,
        )
        if self.meter is not None and not learns:
            dense = ops.forward(query, key, value, None, None, None, None, None, scale, False, self.rule)
            visited_lse = lse
            if before is not None:
                visited_lse = ops.visited_lse(query, key, value, before, thresholds, must_visit, must_skip, scale)
            share = self.sparsity_tensor
            assert share is not None
            self.meter.add(out, visited_lse, *dense, share, shape)
        return out, lse

    def _threshold_now(self, query: Tensor, key: Tensor) -> tuple[float | Tensor | None, bool]:
        """The threshold of this step, and whether this is a dense one from which the first that skips learns."""
        if not isinstance(self.threshold, dict):
            return self.threshold, False
        if self.enable_skipping and self._state is not None and self._state_key != _state_key(query, key):
            self._state, self.step = None, 0  # another video
        schedule = self.threshold

        def threshold_at(step: int) -> float:
            begun = [threshold for first, threshold in schedule.items() if first <= step]
            return begun[-1] if begun else -math.inf

        coming = [threshold_at(self.step + ahead) for ahead in range(LEARNING_STEPS + 1)]
        threshold = next((threshold for threshold in coming if threshold > -math.inf), -math.inf)
        return threshold, coming[0] == -math.inf

    def _thresholds(self, threshold: float | Tensor | None, query: Tensor, key: Tensor) -> Tensor:
        """One for each sequence of the batch, relative to 1."""
        batch, keys = query.shape[0], key.shape[1]
        if not isinstance(threshold, Tensor):
            number = threshold or 0.0
            number = from_relative(number, keys) if self.relative else number
            return _filled(number, batch, query.device)
        if len(threshold) != batch:
            raise ValueError(f"threshold: expected one for each of {batch} sequences, got {len(threshold)}")
        self.threshold = threshold.to(query.device)
        return from_relative(self.threshold, keys) if self.relative else self.threshold

    def _checked_heads(self, heads: int) -> list[int]:
        if self.dense_heads[-1] >= heads:
            raise ValueError(f"dense_heads: expected heads below {heads}, as the query has, got {self.dense_heads[-1]}")
        return list(self.dense_heads)

    def _state_for(self, query: Tensor, key: Tensor) -> SkipState:
        batch, tokens_q, heads, _ = query.shape
        state_key = _state_key(query, key)
        if self._state is None or state_key != self._state_key:
            logger.debug(
                "new skip state: batch %d, heads %d, queries %d, keys %d, %s on %s (before: %s)",
                *state_key,
                self._state_key or "none",
            )
            # A state made in inference mode could not be updated outside it.
            with torch.inference_mode(False):
                self._state = self._make_state(batch, heads, tokens_q, key.shape[1], query.device)
            self._state_key = state_key
            self._steps = 0
        return self._state

    def _make_state(self, slots: int, heads: int, tokens_q: int, tokens_k: int, device: torch.device) -> SkipState:
        """A fresh state in place of the one before."""
        return SkipState(slots, heads, tokens_q, tokens_k, rule=self.rule, device=device)

    def _forced_words(
        self, must_visit: list[Range], must_skip: list[Range], tokens: int, device: torch.device
    ) -> tuple[Tensor | None, Tensor | None]:
        forced_key = (tuple(must_visit), tuple(must_skip), tokens, device)
        if forced_key != self._forced_key:
            self._forced = forced_words(must_visit, must_skip, tokens, device)
            self._forced_key = forced_key
        return self._forced


class SeqParallelLiteAttention(nn.Module):
    """Attention of one layer over keys and values that are split over nodes: a skip state for each split.

    Every call attends one split and returns output and log-sum-exp; `merge_attention` joins the splits.

    Attributes:
        splits: a `LiteAttention` for each split.
    """

    def __init__(
        self,
        num_nodes: int,
        threshold: Threshold | None = -10.0,
        *,
        rule: Rule = "running_max",
        relative: bool = False,
        refresh_interval: int = 0,
        dense_heads: Iterable[int] = (),
        enable_skipping: bool = True,
        max_batch_size: int | None = None,
        reverse_skip_list: bool = True,
        use_int8: bool = False,
    ) -> None:
        """Layers for ``num_nodes`` splits; the other arguments and errors as in `LiteAttention`.

        Shares are of a split's own softmax, so ``relative`` counts the blocks of its keys alone.
        """
        super().__init__()
        if isinstance(num_nodes, bool) or not isinstance(num_nodes, int) or num_nodes < 1:
            raise ValueError(f"num_nodes: expected an int of 1 or more, got {num_nodes!r}")
        self.num_nodes = num_nodes
        heads = check_heads(dense_heads)
        self.splits = nn.ModuleList(
            LiteAttention(
                threshold,
                rule=rule,
                relative=relative,
                refresh_interval=refresh_interval,
                dense_heads=heads,
                enable_skipping=enable_skipping,
                max_batch_size=max_batch_size,
                reverse_skip_list=reverse_skip_list,
                use_int8=use_int8,
            )
            for _ in range(num_nodes)
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        split_idx: int,
        scale: float | None = None,
        *,
        return_softmax_lse: bool = True,
        visit_all: bool = False,
        must_do_list: Sequence[int] | None = None,
        must_skip_list: Sequence[int] | None = None,
        must_visit: Ranges = None,
        must_skip: Ranges = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention to one split of keys and values, number ``split_idx`` (not the index of the GPU).

        Ranges are tokens of the split; ``visit_all`` as in `LiteAttention.forward`. ``return_softmax_lse`` is accepted
        for published code and must be True.

        Returns:
            Output, shape and dtype of ``query``, and log-sum-exp, float32 (batch, heads, tokens_q), natural
            log.

        Raises:
            IndexError: there is no such split.
            TypeError, ValueError, RuntimeError: as `LiteAttention.forward` says.
        """
        if not return_softmax_lse:
            raise ValueError("return_softmax_lse: expected True (a split cannot be merged without), got False")
        if isinstance(split_idx, bool) or not isinstance(split_idx, int):
            raise TypeError(f"split_idx: expected an int, got {type(split_idx).__name__} {split_idx!r}")
        if not 0 <= split_idx < self.num_nodes:
            raise IndexError(f"split_idx: expected 0 to {self.num_nodes - 1}, got {split_idx}")
        layer = self._layers()[split_idx]
        return cast(
            tuple[Tensor, Tensor],
            layer(
                query,
                key,
                value,
                scale,
                return_softmax_lse=True,
                visit_all=visit_all,
                must_do_list=must_do_list,
                must_skip_list=must_skip_list,
                must_visit=must_visit,
                must_skip=must_skip,
            ),
        )

    def set_threshold(self, threshold: Threshold) -> None:
        """Set the threshold of every split, as `LiteAttention.set_threshold` does."""
        for split in self._layers():
            split.set_threshold(threshold)

    def enable_skip_optimization(self, enable: bool = True) -> None:
        """Skip in every split from the next call on, or attend densely."""
        for split in self._layers():
            split.enable_skip_optimization(enable)

    def reset_skip_state(self) -> None:
        """Forget the skip state of every split."""
        for split in self._layers():
            split.reset_skip_state()

    @property
    def sparsity(self) -> float | None:
        """Mean over the splits that were called of `LiteAttention.sparsity`; None before any call."""
        shares = [split.sparsity for split in self._layers() if split.sparsity is not None]
        return sum(shares) / len(shares) if shares else None

    def _layers(self) -> list[LiteAttention]:
        return cast(list[LiteAttention], list(self.splits))


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Join attention over parts of the keys into attention over all of them, exactly.

    Args:
        outs: output of each part, (batch, tokens, heads, head_dim).
        lses: log-sum-exp of each part, (batch, heads, tokens), natural log; -inf where a part holds no key.

    Returns:
        Output, dtype of ``outs``, summed in float32 or better, and log-sum-exp, float32 or better; 0 and -inf
        where no part holds a key.

    Raises:
        ValueError: there are no parts, or their numbers or shapes differ.
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(f"lses: expected one for each of one or more outs, got {len(outs)} outs, {len(lses)} lses")
    batch, tokens, heads, _ = outs[0].shape
    for out, lse in zip(outs, lses, strict=True):
        if out.shape != outs[0].shape:
            raise ValueError(f"outs: expected shape {tuple(outs[0].shape)} of each, got {tuple(out.shape)}")
        if lse.shape != (batch, heads, tokens):
            raise ValueError(f"lses: expected shape {(batch, heads, tokens)} of each, got {tuple(lse.shape)}")
    dtype = torch.promote_types(outs[0].dtype, torch.float32)
    parts = torch.stack([lse.to(dtype) for lse in lses])
    total = parts.logsumexp(0)
    weights = (parts - total).exp().masked_fill(parts == -math.inf, 0.0).transpose(2, 3).unsqueeze(-1)
    merged = torch.zeros_like(outs[0], dtype=dtype)
    for out, weight in zip(outs, weights, strict=True):
        merged += torch.where(weight == 0, 0.0, weight * out.to(dtype))
    return merged.to(outs[0].dtype), total


def from_relative(threshold: Numbers, keys: int) -> Numbers:
    """A threshold, or float32 (batch,), that is relative to 1 / blocks of so many keys, relative to 1; at most 0."""
    uniform = -math.log2(max(ceil_div(keys, BLOCK_K), 1))
    if isinstance(threshold, Tensor):
        return (threshold.double() + uniform).clamp(max=0.0).float()
    return min(threshold + uniform, 0.0)


def _filled(number: float, batch: int, device: torch.device) -> Tensor:
    """Float32 (batch,), not to be written: on GPUs one for all calls with this number on the same stream."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.full((batch,), number, dtype=torch.float32, device=device)
    return _kept(number, batch, device, torch.cuda.current_stream(device).cuda_stream)


@functools.lru_cache(maxsize=1024)
def _kept(number: float, batch: int, device: torch.device, _stream: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.full((batch,), number, dtype=torch.float32, device=device)


def _state_key(query: Tensor, key: Tensor) -> tuple[object, ...]:
    """What a state is made for."""
    batch, tokens_q, heads, _ = query.shape
    return batch, heads, tokens_q, key.shape[1], query.dtype, query.device


def _ranges(ranges: Ranges, flat: Sequence[int] | None, tokens: int, name: str, flat_name: str) -> list[Range]:
    if ranges is not None and flat is not None:
        raise ValueError(f"{flat_name}: expected None beside {name}, got both")
    if flat is not None:
        return from_flat_list(flat, tokens, flat_name)
    return check_ranges(ranges or (), tokens, name)


@functools.cache
def _warn_dense(reason: str) -> None:
    warnings.warn(f"{reason}; attention is dense, nothing is skipped", stacklevel=3)


def _dense(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True).transpose(1, 2).contiguous()


def _dense_lse(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Natural log-sum-exp, float32 (batch, heads, tokens_q), by tiles to bound the memory."""
    groups = query.float().unflatten(2, (key.shape[2], -1))
    return torch.cat(
        [
            torch.einsum("bqkgd,btkd->bkgqt", tile, key.float()).mul(scale).logsumexp(-1).flatten(1, 2)
            for tile in groups.split(TILE_Q, dim=1)
        ],
        dim=-1,
    )
