"""What vLLM loads in each of its processes: the name LITE_ATTN, and nothing else until it is asked for.

vLLM turns the name of an attention backend into a member of an enum. Our member is created when the name is
first looked up, which happens only where `--attention-backend LITE_ATTN` was given; that is also the moment at
which the hooks go in. A process that gets its configuration by pickle looks the name up in the same way.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from enum import Enum
from pathlib import Path
from typing import Any

NAME = "LITE_ATTN"
METRICS_DIRECTORY_VARIABLE = "LITE_ATTENTION_METRICS_DIR"

_CPU_BACKEND = "lite_attention.backend.vllm.cpu.LiteAttentionBackend"
_CUDA_BACKEND = "lite_attention.backend.vllm.cuda.LiteAttentionBackend"


class _Members(dict[str, Enum]):
    """The enum's members by name; a lookup of ours creates it."""

    def __missing__(self, name: str) -> Enum:
        if name != NAME:
            raise KeyError(name)
        return _select()


def register() -> None:
    """Entry point `vllm.general_plugins`: make the name known. Idempotent."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if not isinstance(AttentionBackendEnum._member_map_, _Members):
        AttentionBackendEnum._member_map_ = _Members(AttentionBackendEnum._member_map_)


def member() -> Enum:
    """The member LITE_ATTN of vLLM's enum of attention backends, created and activated if need be."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    register()
    return AttentionBackendEnum._member_map_[NAME]


def _reduce(_self: Enum, _protocol: int) -> tuple[Any, ...]:
    # An enum pickles by value, which a process that has not loaded its plugins cannot find.
    return member, ()


def _select() -> Enum:
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from lite_attention.backend.vllm import hooks

    created = object.__new__(AttentionBackendEnum)
    created._name_ = NAME
    created._value_ = _CPU_BACKEND if current_platform.is_cpu() else _CUDA_BACKEND
    created.__reduce_ex__ = _reduce.__get__(created)
    AttentionBackendEnum._member_map_[NAME] = created
    AttentionBackendEnum._value2member_map_[created._value_] = created
    AttentionBackendEnum._member_names_.append(NAME)
    type.__setattr__(AttentionBackendEnum, NAME, created)
    metrics_directory()
    hooks.install_process_hooks(created)
    return created


def metrics_directory() -> Path:
    """Where this process and those that it starts count, made if need be and removed when it ends."""
    if METRICS_DIRECTORY_VARIABLE not in os.environ:
        directory = os.environ[METRICS_DIRECTORY_VARIABLE] = tempfile.mkdtemp(prefix="lite-attention-")
        atexit.register(_remove, directory, os.getpid())
    return Path(os.environ[METRICS_DIRECTORY_VARIABLE])


def _remove(directory: str, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(directory, ignore_errors=True)
