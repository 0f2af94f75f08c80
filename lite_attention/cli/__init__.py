"""The `lite-attention` command, one module a command; what is slow to import is imported when one runs."""

from __future__ import annotations

from typing import Annotated

import typer

from lite_attention.cli import calibrate, doctor, generate, model, plot, serve
from lite_attention.version import __version__

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Skip-list attention for vLLM: decode steps read only the key blocks that matter.",
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


app.command(no_args_is_help=True)(generate.generate)
# What serve does not know belongs to vLLM.
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve.serve)
app.command()(doctor.doctor)
app.command(no_args_is_help=True)(calibrate.calibrate)
app.command(no_args_is_help=True)(plot.plot)
app.command(no_args_is_help=True)(model.model)


def main() -> None:
    app(prog_name="lite-attention")
