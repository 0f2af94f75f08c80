"""How an engine's functions are wrapped."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def wrap(owner: Any, name: str, wrapper: Callable[..., Any], engine: str, tested: str) -> None:
    """Replace `owner.name` by a function that gets the original as its first argument. Idempotent.

    Raises:
        RuntimeError: this engine, named with its version, has no such function.
    """
    original = getattr(owner, name, None)
    if original is None:
        raise RuntimeError(
            f"LITE_ATTN needs {owner.__module__}.{owner.__qualname__}.{name}, which {engine} does not have; "
            f"tested versions: {tested}"
        )
    if getattr(original, "_lite_attn", False):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    wrapped._lite_attn = True  # type: ignore[attr-defined]
    static = isinstance(vars(owner).get(name), staticmethod)
    setattr(owner, name, staticmethod(wrapped) if static else wrapped)
