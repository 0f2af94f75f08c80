"""What the workers of an engine skipped, as Prometheus metrics of its front end.

A worker counts into a small file that it alone writes; the front end adds the files of a directory up when
it is scraped. Nothing waits for anything: a scrape may see a step half counted.
"""

from __future__ import annotations

import bisect
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

LOWEST_BUCKET: Final = -32

THRESHOLD_BUCKETS: Final = tuple(str(-bucket) for bucket in range(1 - LOWEST_BUCKET))
"""Label values: the threshold rounded to a whole number; "-32" holds all lower ones too."""

ERROR_BOUNDS: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, math.inf)
"""Upper ends of the buckets of the errors of checked tokens."""

_ERROR_UNIT = 1e-9  # errors are added up as whole numbers of it
_LARGEST_ERROR = 1000.0

FALLBACK_REASONS: Final = (
    "sliding_window",
    "kv_cache_dtype",
    "sinks",
    "alibi",
    "softcap",
    "attn_type",
    "kv_sharing",
    "head_size",
    "dtype",
    "speculative",
    "block_size",
    "platform",
    "runner",
    "kv_transfer",
    "parallelism",
    "bad_options",
)

Counts = NDArray[np.int64]

# A counter file is an array of int64: the layout's mark, three gauges, then these groups of counters.
_MARK = 0x4C495445_0003
_SLOTS, _ACTIVE_SLOTS, _STATE_BYTES = range(1, 4)
_HEADER = 4
_ROWS = slice(_HEADER, _HEADER + len(THRESHOLD_BUCKETS))
_VISITED = slice(_ROWS.stop, _ROWS.stop + len(THRESHOLD_BUCKETS))
_TOTAL = slice(_VISITED.stop, _VISITED.stop + len(THRESHOLD_BUCKETS))
_FALLBACKS = slice(_TOTAL.stop, _TOTAL.stop + len(FALLBACK_REASONS))
_CHECKED = slice(_FALLBACKS.stop, _FALLBACKS.stop + len(THRESHOLD_BUCKETS) * len(ERROR_BOUNDS))
_ERRORS = slice(_CHECKED.stop, _CHECKED.stop + len(THRESHOLD_BUCKETS))
_LENGTH = _ERRORS.stop


def bucket_index(threshold: float) -> int:
    """The place of a threshold in THRESHOLD_BUCKETS."""
    return -round(max(float(LOWEST_BUCKET), min(0.0, threshold)))


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What was counted, by place in THRESHOLD_BUCKETS and FALLBACK_REASONS.

    `checked` is of tokens by THRESHOLD_BUCKETS and ERROR_BOUNDS, `errors` the sum of their errors.
    """

    slots: int
    active_slots: int
    state_bytes: int
    rows: Counts
    blocks_visited: Counts
    blocks_total: Counts
    fallback_rows: Counts
    checked: Counts
    errors: NDArray[np.float64]

    @classmethod
    def of(cls, values: Counts) -> Self:
        return cls(
            int(values[_SLOTS]),
            int(values[_ACTIVE_SLOTS]),
            int(values[_STATE_BYTES]),
            values[_ROWS],
            values[_VISITED],
            values[_TOTAL],
            values[_FALLBACKS],
            values[_CHECKED].reshape(len(THRESHOLD_BUCKETS), len(ERROR_BOUNDS)),
            (values[_ERRORS] * _ERROR_UNIT).astype(np.float64),
        )


class StepCounters:
    """The counter file of one worker, which alone writes it."""

    def __init__(self, values: np.memmap[Any, np.dtype[np.int64]]) -> None:
        self._values = values

    @classmethod
    def create(cls, path: Path, slots: int) -> Self:
        """A new file with nothing counted, for a worker with that many slots."""
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.memmap(path, dtype=np.int64, mode="w+", shape=(_LENGTH,))
        values[_SLOTS] = slots
        values[0] = _MARK  # last: before it, the file counts as unfinished
        return cls(values)

    @classmethod
    def open(cls, path: Path) -> Self:
        """A file that exists, to read it or to go on counting."""
        values = np.memmap(path, dtype=np.int64, mode="r+")
        if values.shape != (_LENGTH,) or values[0] != _MARK:
            raise ValueError(f"{path}: expected a counter file of this version")
        return cls(values)

    def add_rows(self, threshold: float, rows: int, blocks_visited: int, blocks_total: int) -> None:
        """Decode rows with this threshold, and the blocks of their contexts over all layers and heads."""
        bucket = bucket_index(threshold)
        self._values[_ROWS.start + bucket] += rows
        self._values[_VISITED.start + bucket] += blocks_visited
        self._values[_TOTAL.start + bucket] += blocks_total

    def add_fallback(self, reason: str, rows: int) -> None:
        """Decode rows that stock attention computed although they asked for skipping."""
        self._values[_FALLBACKS.start + FALLBACK_REASONS.index(reason)] += rows

    def add_error(self, threshold: float, error: float) -> None:
        """A decode row with this threshold was also computed dense, and differed by so much."""
        error = error if error < _LARGEST_ERROR else _LARGEST_ERROR  # of outputs that are not finite, too
        bucket = bucket_index(threshold)
        place = bucket * len(ERROR_BOUNDS) + bisect.bisect_left(ERROR_BOUNDS, error)
        self._values[_CHECKED.start + place] += 1
        self._values[_ERRORS.start + bucket] += round(error / _ERROR_UNIT)

    def set_active_slots(self, slots: int) -> None:
        self._values[_ACTIVE_SLOTS] = slots

    def set_state_bytes(self, state_bytes: int) -> None:
        """Memory of skip state, in use or kept for the next request, and of the summaries of a cache."""
        self._values[_STATE_BYTES] = state_bytes

    def end(self) -> None:
        """The worker is gone, with its slots and memory; what it counted stays."""
        self._values[[_SLOTS, _ACTIVE_SLOTS, _STATE_BYTES]] = 0

    def read(self) -> Snapshot:
        return Snapshot.of(np.array(self._values))


def read_directory(directory: Path) -> Snapshot:
    """The sum over the counter files in a directory; other and unfinished files count nothing."""
    total = np.zeros(_LENGTH, dtype=np.int64)
    for path in directory.glob("*"):
        try:
            values = np.fromfile(path, dtype=np.int64)
        except OSError:
            continue
        if values.shape == (_LENGTH,) and values[0] == _MARK:
            total += values
    return Snapshot.of(total)


class LiteAttnCollector(Collector):
    """Metrics made from a directory of counter files at the moment of a scrape."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def describe(self) -> Iterator[Metric]:
        return self._metrics(read_directory(self.directory))

    def collect(self) -> Iterator[Metric]:
        return self._metrics(read_directory(self.directory))

    def _metrics(self, counted: Snapshot) -> Iterator[Metric]:
        seen = [index for index, rows in enumerate(counted.rows) if rows]
        for name, help_text, values in (
            ("lite_attn_rows", "Decode rows computed with skipping.", counted.rows),
            (
                "lite_attn_blocks_visited",
                "Blocks these rows read, over layers and heads.",
                counted.blocks_visited,
            ),
            (
                "lite_attn_blocks",
                "Blocks in these rows' contexts, over layers and heads.",
                counted.blocks_total,
            ),
        ):
            family = CounterMetricFamily(name, help_text, labels=["threshold"])
            for index in seen:
                family.add_metric([THRESHOLD_BUCKETS[index]], int(values[index]))
            yield family
        fallbacks = CounterMetricFamily(
            "lite_attn_fallback_rows",
            "Decode rows that asked for skipping and ran stock attention.",
            labels=["reason"],
        )
        for reason, rows in zip(FALLBACK_REASONS, counted.fallback_rows, strict=True):
            fallbacks.add_metric([reason], int(rows))
        yield fallbacks
        errors = HistogramMetricFamily(
            "lite_attn_output_error",
            "Relative L2 error of the attention output of checked decode rows, mean over layers.",
            labels=["threshold"],
        )
        bounds = [floatToGoString(bound) for bound in ERROR_BOUNDS]
        for label, counts, total in zip(THRESHOLD_BUCKETS, counted.checked, counted.errors, strict=True):
            if counts.any():
                buckets = [(bound, int(count)) for bound, count in zip(bounds, counts.cumsum(), strict=True)]
                errors.add_metric([label], buckets, float(total))
        yield errors
        yield GaugeMetricFamily("lite_attn_active_slots", "Sequences that hold skip state.", counted.active_slots)
        yield GaugeMetricFamily("lite_attn_slots", "Sequences that can hold skip state.", counted.slots)
        yield GaugeMetricFamily(
            "lite_attn_state_bytes", "Bytes of skip state, in use or kept, and of summaries.", counted.state_bytes
        )


_collectors: WeakKeyDictionary[CollectorRegistry, LiteAttnCollector] = WeakKeyDictionary()


def register(directory: Path, registry: CollectorRegistry = REGISTRY) -> None:
    """Show the metrics of a directory in a registry; done again, only the directory changes.

    With PROMETHEUS_MULTIPROC_DIR set, as with several API servers, a scrape is answered from that directory
    and not from the processes' own registries; then the metrics join what is read from it.
    """
    known = _collectors.get(registry)
    if known is not None:
        known.directory = directory
        return
    collector = _collectors[registry] = LiteAttnCollector(directory)
    registry.register(collector)
    if registry is REGISTRY and "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        _join_multiprocess(collector)


def _join_multiprocess(collector: LiteAttnCollector) -> None:
    stock = MultiProcessCollector.collect

    def collect(self: MultiProcessCollector) -> Iterator[Metric]:
        yield from stock(self)
        yield from collector.collect()

    MultiProcessCollector.collect = collect  # type: ignore[method-assign]
