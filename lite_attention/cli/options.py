"""The skipping options that commands share."""

from __future__ import annotations

import json
from typing import Any

import typer

from lite_attention.serving.params import CONFIG_KEY, ServerOptions

THRESHOLD_HELP = "log2 of the softmax share below which a block is skipped; lower skips less, -inf never."
ENABLE_HELP = "Skip at all."
REFRESH_HELP = "Visit all blocks every this many decode steps; 0 is never."
WARMUP_HELP = "Decode steps at the start of a request that visit all blocks."


def given(**options: Any) -> dict[str, Any]:
    """The options that were set on the command line, checked as a server checks them."""
    table = {name: value for name, value in options.items() if value is not None}
    check(table)
    return table


def check(table: Any) -> None:
    """Exits with a usage error where an engine would refuse its `lite_attn` table."""
    try:
        ServerOptions.from_additional_config({CONFIG_KEY: table})
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def json_object(text: str) -> dict[str, Any]:
    """The object that an option's text is; exits with a usage error where it is none."""
    try:
        table = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"expected a JSON object: {error}") from None
    if not isinstance(table, dict):
        raise typer.BadParameter("expected a JSON object")
    return table
