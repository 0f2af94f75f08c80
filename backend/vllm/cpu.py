"""LITE_ATTN on vLLM's CPU engine: stock attention for prefill, the decode operator for rows that skip."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from lite_attention.backend.vllm import hooks, steps, support
from lite_attention.backend.vllm.checks import add_errors
from lite_attention.backend.vllm.state import LayerState, number_layers
from lite_attention.native import cpu as kernels
from lite_attention.tiles import ceil_div

logger = init_logger(__name__)
support.warn_of_untested_version("cpu")
hooks.install_worker_hooks()

READABLE_LAYOUTS = ("vec", "vec16")
"""Cache layouts of vLLM's CPU kernels that the decode operator reads: keys channel by channel within a page."""


class LiteAttentionBackend(CPUAttentionBackend):
    """vLLM's CPU attention with decode steps that visit only the blocks that matter."""

    @staticmethod
    def get_impl_cls() -> type[LiteAttentionImpl]:
        return LiteAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[LiteMetadataBuilder]:
        return LiteMetadataBuilder


class LiteMetadataBuilder(CPUAttentionMetadataBuilder):
    """Adds to the stock metadata which tokens the decode operator computes (`lite`)."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.isa: str
        if self.isa == "amx":
            # Its keys and values are packed for matrix tiles; the vector layout serves the same dtypes.
            logger.info_once(
                "LITE_ATTN keeps the KV cache in vLLM's vector layout, as its kernels cannot read the one for AMX. "
                "Prefill may be slower than with CPU_ATTN, and requests that do not skip are rounded differently."
            )
            self.isa = "vec"
            self._set_isa_to_layers(layer_names)
        support.warn_of_compiled_model(vllm_config)
        impls = support.impls_of(vllm_config, layer_names, LiteAttentionImpl)
        self.reason = self._layout_reason() or support.group_reason(impls, len(layer_names), self.block_size)
        self.kv_heads = sum(impl.num_kv_heads for impl in impls)
        support.check_profiles(vllm_config, number_layers(vllm_config))
        state_bytes = sum(impl.state.memory_bytes() for impl in impls if impl.state)
        support.report(vllm_config, layer_names, self.reason, state_bytes, kernels.status())

    def _layout_reason(self) -> str | None:
        if type(self) is not LiteMetadataBuilder:
            return "attn_type"
        return None if self.isa in READABLE_LAYOUTS else "platform"

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False, **kwargs: Any) -> Any:
        common = common_attn_metadata
        metadata = super().build(common_prefix_len, common, fast_build, **kwargs)
        metadata.lite = None
        tracker = steps.tracker()
        # Builders derived from this one may hand over rows that are no requests, as chunked attention does.
        if tracker is None or fast_build or type(self) is not LiteMetadataBuilder:
            return metadata
        query_start = common.query_start_loc_cpu.tolist()
        plan = tracker.plan(query_start, self.kv_heads, self.reason)
        if plan is None:
            return metadata
        tables = [common.block_table_tensor[wave.rows, : self._pages(wave)] for wave in plan.waves]
        metadata.lite = LiteStep(plan, tables)
        if 0 < len(plan.stock_rows) < common.num_reqs:
            metadata.lite.stock = self._stock_part(common, query_start, plan.stock_rows)
        return metadata

    def _pages(self, wave: steps.Wave) -> int:
        return ceil_div(int(wave.seq_lens.max()), self.block_size)

    def _stock_part(self, common: Any, query_start: list[int], rows: list[int]) -> tuple[Any, Tensor]:
        """Metadata of a batch that holds only `rows`, and their tokens."""
        spans = [(query_start[row], query_start[row + 1]) for row in rows]
        lengths = torch.tensor([end - start for start, end in spans])
        tokens = torch.cat([torch.arange(start, end) for start, end in spans])
        index = torch.tensor(rows)
        part = copy.copy(common)
        part.num_reqs, part.num_actual_tokens = len(rows), len(tokens)
        part.query_start_loc = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(common.query_start_loc.dtype)
        part.query_start_loc_cpu = part.query_start_loc
        part.max_query_len = int(lengths.max())
        part.seq_lens = common.seq_lens[index]
        part.block_table_tensor = common.block_table_tensor[index]
        part.slot_mapping = common.slot_mapping[tokens]
        return super().build(0, part), tokens


@dataclass
class LiteStep:
    """A step's plan for the layers of one KV cache group.

    Attributes:
        tables: block table (tokens, pages) of each wave.
        stock: metadata of the rows left to stock attention and their tokens, when they are some of many.
    """

    plan: steps.StepPlan
    tables: list[Tensor]
    stock: tuple[Any, Tensor] | None = None


class LiteAttentionImpl(CPUAttentionBackendImpl):
    """One layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = get_current_vllm_config()
        self.reason = support.config_reason(config) or support.layer_reason(
            self,
            self.attn_type == AttentionType.DECODER,
            config.model_config.dtype,
            self.is_fp8_kv_cache,
        )
        self.state: LayerState | None = None
        self._cache: tuple[Any, Tensor, Tensor] | None = None
        if self.reason is None:
            room = support.sequence_room(config)
            self.state = LayerState(support.pool_slots(config), self.num_kv_heads, room)

    def _split(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (pages, page_size, kv_heads, head_dim) as views of the cache."""
        identity = (kv_cache.data_ptr(), kv_cache.shape, kv_cache.stride())
        if self._cache is None or self._cache[0] != identity:
            pages, heads, page_size, _ = kv_cache.shape
            key, value = kv_cache.view(pages, heads, 2 * page_size, -1).chunk(2, dim=2)
            page, head = key.stride()[:2]
            key = key.as_strided((pages, page_size, heads, self.head_size), (page, 1, head, page_size))
            self._cache = identity, key, value.transpose(1, 2)
        return self._cache[1:]

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        if self.state is not None and layer.isa in READABLE_LAYOUTS:
            keys, _ = self._split(kv_cache)
            torch.ops.lite_attention.summarize(keys, slot_mapping, self.state.summaries_of(keys))

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
        if step is None or self.state is None:
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        if step.stock is not None:
            metadata, tokens = step.stock
            of_stock = torch.empty_like(output[: len(tokens)])
            super().forward(layer, query[tokens], key, value, kv_cache, metadata, of_stock)
            output[tokens] = of_stock
        elif step.plan.stock_rows:
            super().forward(layer, query, key, value, kv_cache, attn_metadata, output)
        keys, values = self._split(kv_cache)
        summaries = self.state.summaries_of(keys)
        by_head = output.view(-1, self.num_heads, self.head_size)
        counts, errors = step.plan.visited_by_wave("cpu"), step.plan.errors_by_wave("cpu")
        for wave, table, count, of_checked in zip(step.plan.waves, step.tables, counts, errors, strict=True):
            queries = query[wave.indices]
            out, lse, visited = torch.ops.lite_attention.decode(
                queries,
                keys,
                values,
                summaries,
                table,
                wave.seq_lens,
                wave.slots,
                wave.thresholds[self.state.number],
                wave.visit_all,
                self.state.mask,
                self.scale,
            )
            by_head[wave.indices] = out
            count += visited
            if at := wave.checked:
                of_rows = out[at], lse[at], visited[at], queries[at]
                where = table[at], wave.seq_lens[at], wave.slots[at]
                add_errors(of_checked, self.state, *of_rows, keys, values, *where, self.scale)
        return output
