"""`lite-attention plot`: a picture of a saved trace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def plot(
    trace: Annotated[Path, typer.Argument(help="File that Report.save wrote.", exists=True, dir_okay=False)],
    out: Annotated[Path, typer.Option(help="Picture that is written: PNG, PDF or SVG, by its name.", dir_okay=False)],
) -> None:
    """Draw what was skipped in a generation.

    Of each guidance branch a heat map of the share of blocks skipped, layers over steps, and its mean over the
    layers; and the skip masks that the trace holds, key blocks over query tiles.

    \b
    Example:
      report = lite_attention.backend.diffusers.enable(pipeline, threshold=-8.0)
      video = pipeline(prompt)
      report.save("wan.trace")

      lite-attention plot wan.trace --out wan.png
    """
    if not out.parent.is_dir():
        raise typer.BadParameter(f"--out: expected a file in a folder that exists, got {out}")
    try:
        from lite_attention.report import Report

        Report.load(trace).plot(out)
    except ImportError as error:
        raise typer.BadParameter(f"{error}; what the picture needs: pip install 'lite-attention[plot]'") from None
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    print(f"Written: {out}")
