"""LITE_ATTN on CUDA: FlashAttention for prefill, the decode kernel for rows that skip.

A batch in which every row has one token is one launch for all rows, those that do not skip among them: this is what
decode graphs replay, so which row skips stands in memory and not in Python. In any other batch, never captured, Python
leaves the rows of several tokens to FlashAttention; those of one token are computed as in a batch of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from lite_attention.backend.vllm import hooks, launches, steps, support
from lite_attention.backend.vllm.checks import add_errors
from lite_attention.backend.vllm.device import upload
from lite_attention.backend.vllm.state import LayerState, number_layers
from lite_attention.decode_cuda import check_supported, decode_into
from lite_attention.native import cuda as kernels
from lite_attention.tiles import ceil_div

support.warn_of_untested_version("cuda")
hooks.install_worker_hooks()
hooks.install_gpu_worker_hooks()


class LiteAttentionBackend(FlashAttentionBackend):
    """vLLM's FlashAttention with decode steps that visit only the blocks that matter."""

    @staticmethod
    def get_impl_cls() -> type[LiteAttentionImpl]:
        return LiteAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[LiteMetadataBuilder]:
        return LiteMetadataBuilder


@dataclass
class Rows:
    """Tokens of different sequences for one launch of the decode kernel; see `lite_attention.reference.decode`.

    Attributes:
        indices: (rows,) int64, place of each token in the batch; None where row n has token n.
        thresholds: (layers, rows) float32.
        visited: (rows,) int32, added to.
        checked: rows, in order, that are also computed dense; never in a batch that is captured.
        errors: (checked rows, 2) float32, see `lite_attention.backend.vllm.checks.add_errors`.
    """

    indices: Tensor | None
    block_table: Tensor
    seq_lens: Tensor
    slots: Tensor
    thresholds: Tensor
    visit_all: Tensor
    visited: Tensor
    checked: Sequence[int] = ()
    errors: Tensor | None = None


@dataclass
class LiteStep:
    """What the layers of one KV cache group compute in a step.

    Attributes:
        launches: of the decode kernel, in order.
        stock_from: first token of those that stock attention computes before, all to the end; None for no token.
    """

    launches: list[Rows]
    stock_from: int | None = None


class LiteMetadataBuilder(FlashAttentionMetadataBuilder):
    """Adds to the stock metadata which tokens the decode kernel computes (`lite`)."""

    supports_update_block_table = False  # launches hold block tables of their own

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        stock = super().get_cudagraph_support(vllm_config, kv_cache_spec)
        if support.config_reason(vllm_config) is not None:
            return stock
        return min(stock, AttentionCGSupport.UNIFORM_BATCH, key=lambda level: level.value)

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        impls = support.impls_of(vllm_config, layer_names, LiteAttentionImpl)
        self.reason = support.group_reason(impls, len(layer_names), self.block_size)
        if type(self) is not LiteMetadataBuilder:
            self.reason = "attn_type"
        self.kv_heads = sum(impl.num_kv_heads for impl in impls)
        state_bytes = sum(impl.state.memory_bytes() for impl in impls if impl.state)
        layers = number_layers(vllm_config)
        support.check_profiles(vllm_config, layers)
        if self.reason is None:
            shared: launches.Launches = impls[0].launches
            self.fields = shared.fields(len(layers))
            state_bytes += shared.memory_bytes() + self.fields.buffer.nbytes
        support.report(vllm_config, layer_names, self.reason, state_bytes, kernels.status())

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False, **kwargs: Any) -> Any:
        common, step = common_attn_metadata, None
        # Builders derived from this one may hand over rows that are no requests, as chunked attention does.
        if not fast_build and common.causal is True and type(self) is LiteMetadataBuilder:
            common, step = self._step(common)
        metadata = super().build(common_prefix_len, common, fast_build, **kwargs)
        metadata.lite = step
        return metadata

    def use_cascade_attention(self, *args: Any, **kwargs: Any) -> bool:
        # Cascades are for batches of single tokens, which are ours, and keep them out of CUDA graphs.
        return self.reason is not None and super().use_cascade_attention(*args, **kwargs)

    def _step(self, common: Any) -> tuple[Any, LiteStep | None]:
        """What is left of a batch to stock attention, and what the layers compute; None when they are all stock."""
        tracker = steps.tracker()
        plan = None
        if tracker is not None:
            plan = tracker.plan(common.query_start_loc_cpu.tolist(), self.kv_heads, self.reason)
        if self.reason is not None:
            return common, None
        if common.max_query_len == 1:
            return common, LiteStep([self._single_tokens(common, plan)])
        if plan is None:
            return common, None
        counts = zip(plan.visited_by_wave(self.device), plan.errors_by_wave(self.device), strict=True)
        waves = [self._wave(common, wave, *count) for wave, count in zip(plan.waves, counts, strict=True)]
        if not plan.stock_rows:
            return common, LiteStep(waves)
        first = int(common.query_start_loc_cpu[plan.stock_rows[0]])
        return _from_row(common, plan.stock_rows[0], first), LiteStep(waves, stock_from=first)

    def _single_tokens(self, common: Any, plan: steps.StepPlan | None) -> Rows:
        """All rows of a batch, padding too, at addresses that stay the same."""
        rows, fields = common.num_reqs, self.fields
        fields.stage(None if plan is None else plan.waves[0])
        checked: list[int] = []
        errors = None
        if plan is not None:
            plan.visited, plan.places = fields.visited[:rows], plan.waves[0].rows.tolist()
            checked = [plan.places[place] for place in plan.waves[0].checked]
            (errors,) = plan.errors_by_wave(self.device)
        return Rows(
            indices=None,
            block_table=common.block_table_tensor[:, : self._pages(self.model_config.max_model_len)],
            seq_lens=common.seq_lens,
            slots=fields.slots[:rows],
            thresholds=fields.thresholds[:, :rows],
            visit_all=fields.visit_all[:rows],
            visited=fields.visited[:rows],
            checked=checked,
            errors=errors,
        )

    def _wave(self, common: Any, wave: steps.Wave, visited: Tensor, errors: Tensor) -> Rows:
        pages = common.block_table_tensor[:, : self._pages(int(wave.seq_lens.max()))]
        return Rows(
            indices=upload(wave.indices, self.device),
            block_table=pages[upload(wave.rows, self.device)],
            seq_lens=upload(wave.seq_lens, self.device),
            slots=upload(wave.slots, self.device),
            thresholds=upload(wave.thresholds, self.device),
            visit_all=upload(wave.visit_all, self.device),
            visited=visited,
            checked=wave.checked,
            errors=errors,
        )

    def _pages(self, tokens: int) -> int:
        return ceil_div(tokens, self.block_size)


def _from_row(common: Any, row: int, token: int) -> Any:
    """A batch's common metadata, as far as the stock builder reads it, from a row on that begins with `token`."""
    ranges = common.mm_req_doc_ranges
    return common.replace(
        num_reqs=common.num_reqs - row,
        num_actual_tokens=common.num_actual_tokens - token,
        query_start_loc=common.query_start_loc[row:] - token,
        query_start_loc_cpu=common.query_start_loc_cpu[row:] - token,
        seq_lens=common.seq_lens[row:],
        block_table_tensor=common.block_table_tensor[row:],
        slot_mapping=common.slot_mapping[token:],
        mm_req_doc_ranges=ranges and {at - row: spans for at, spans in ranges.items() if at >= row},
    )


class LiteAttentionImpl(FlashAttentionImpl):
    """One layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = get_current_vllm_config()
        device = torch.device("cuda", torch.cuda.current_device())
        dtype = config.model_config.dtype
        self.reason = (
            support.config_reason(config)
            or support.layer_reason(
                self,
                self.attn_type == AttentionType.DECODER,
                dtype,
                self.kv_cache_dtype not in ("auto", str(dtype).removeprefix("torch.")),
            )
            or self._kernel_reason(dtype, device)
        )
        self.state: LayerState | None = None
        if self.reason is None:
            room = support.sequence_room(config)
            slots = support.pool_slots(config)
            self.state = LayerState(slots, self.num_kv_heads, room, device)
            self.launches = launches.of_engine(config, device)
            self.rows_a_launch = self.launches.reserve(self.num_heads, self.num_kv_heads, self.head_size, room)

    def _kernel_reason(self, dtype: torch.dtype, device: torch.device) -> str | None:
        try:
            check_supported(dtype, self.head_size, self.num_queries_per_kv, device)
        except (TypeError, ValueError, RuntimeError):
            return "platform"
        return None

    def _split(self, kv_cache: Tensor) -> tuple[Tensor, ...]:
        """Keys and values (pages, page_size, kv_heads, head_dim) as views of the cache."""
        return kv_cache.transpose(1, 2).split(self.head_size, dim=-1)

    def allocate_summaries(self, kv_cache: Tensor) -> None:
        """The layer got its cache."""
        assert self.state is not None
        self.state.summaries_of(self._split(kv_cache)[0])

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        if self.state is not None:
            torch.ops.lite_attention.summarize(self._split(kv_cache)[0], slot_mapping, self.state.summaries)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        step: LiteStep | None = getattr(attn_metadata, "lite", None)
        if step is None:
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        if (first := step.stock_from) is not None:
            super().forward(layer, query[first:], key, value, kv_cache, attn_metadata, output[first:], *args, **kwargs)
        for rows in step.launches:
            if rows.indices is None:
                self._decode(output, query, kv_cache, rows)
            else:
                out = output.new_empty(len(rows.indices), *output.shape[1:])
                self._decode(out, query[rows.indices], kv_cache, rows)
                output[rows.indices] = out
        return output

    def _decode(self, out: Tensor, query: Tensor, kv_cache: Tensor, rows: Rows) -> None:
        """Write (rows, heads, head_dim) of `out`; it and the query may go on behind."""
        assert self.state is not None and self.state.summaries is not None
        keys, values = self._split(kv_cache)
        count, already_checked = len(rows.slots), 0
        for first in range(0, count, self.rows_a_launch):
            part = slice(first, min(first + self.rows_a_launch, count))
            size = part.stop - part.start
            lse = self.launches.lse[: size * self.num_heads].view(size, self.num_heads)
            checked = [row for row in rows.checked if part.start <= row < part.stop]
            visited_before = rows.visited[checked] if checked else None
            decode_into(
                out[part],
                lse,
                rows.visited[part],
                query[part],
                keys,
                values,
                self.state.summaries,
                rows.block_table[part],
                rows.seq_lens[part],
                rows.slots[part],
                rows.thresholds[self.state.number, part],
                rows.visit_all[part],
                self.state.mask,
                self.scale,
                self.launches.workspace,
            )
            if visited_before is not None:
                assert rows.errors is not None
                errors = rows.errors[already_checked:][: len(checked)]
                already_checked += len(checked)
                visited = rows.visited[checked] - visited_before
                of_rows = out[checked], lse[[row - first for row in checked]], visited, query[checked]
                at = rows.block_table[checked], rows.seq_lens[checked], rows.slots[checked]
                add_errors(errors, self.state, *of_rows, keys, values, *at, self.scale)
