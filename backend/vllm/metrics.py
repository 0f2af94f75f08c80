"""The seam through which `lite_attn_*` metrics reach vLLM's `/metrics`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase

from lite_attention.backend.vllm.plugin import METRICS_DIRECTORY_VARIABLE
from lite_attention.serving import metrics


class LiteAttnStatLogger(StatLoggerBase):
    """Entry point `vllm.stat_logger_plugins`: registers the collector where LITE_ATTN was asked for.

    The collector reads the workers' counter files when `/metrics` is scraped, so nothing is recorded here.
    """

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        directory = os.environ.get(METRICS_DIRECTORY_VARIABLE)
        if directory is not None:
            metrics.register(Path(directory))

    def record(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the workers count."""

    def log_engine_initialized(self) -> None:
        """Nothing to say."""
