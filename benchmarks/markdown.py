"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str | None = None) -> str:
    """A table with a line for each row, and the caption before it."""
    above = [] if caption is None else [caption, ""]
    return "\n".join([*above, _line(columns), "|---" * len(columns) + "|", *map(_line, rows)])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
