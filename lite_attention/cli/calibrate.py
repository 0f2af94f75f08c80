"""`lite-attention calibrate`: thresholds for the layers of a diffusion model that cost what a user allows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lite_attention.costs import Cost


def calibrate(
    pipeline: Annotated[str, typer.Argument(help="Folder or name of a pipeline that the library diffusers loads.")],
    prompts: Annotated[Path, typer.Option(help="Text file, one prompt a line: what to calibrate on.", dir_okay=False)],
    target: Annotated[
        str,
        typer.Option(
            help="What skipping may cost each layer: error=0.05 (relative L2 error of its output), dropped=0.01 "
            "(share of the softmax's mass) or sparsity=0.5 (share of blocks)."
        ),
    ],
    out: Annotated[Path, typer.Option(help="File that is written, TOML.", dir_okay=False)],
    check: Annotated[
        Path | None, typer.Option(help="Other prompts: what the result costs on them is measured, too.", dir_okay=False)
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Of a video.")] = None,
    rule: Annotated[str, typer.Option(help="When a block is skipped: running_max or mass.")] = "running_max",
    refresh_interval: Annotated[int, typer.Option(min=0, help="Visit all blocks every so many steps; 0 never.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the first prompt's noise; each has another.")] = 0,
    device: Annotated[str, typer.Option(help="Where the pipeline runs, such as cuda or cpu.")] = "cuda",
    dtype: Annotated[str, typer.Option(help="Of the pipeline's weights.")] = "bfloat16",
) -> None:
    """Find a threshold for each layer of a diffusion model.

    The model generates what the prompts say several times. Each attention is computed twice, skipping and dense, and
    the thresholds are moved until skipping costs each layer what --target says. The file is for pipelines of the same
    model that generate the same number of tokens:

        enable(pipeline, calibration="wan.toml")
    """
    from lite_attention.calibration import Target
    from lite_attention.options import check_rule

    try:
        Target.parse(target)
        known_rule = check_rule(rule)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    lines, check_lines = _read(prompts), _read(check) if check else []
    size = {"num_inference_steps": steps, "height": height, "width": width, "num_frames": frames}
    given = {name: value for name, value in size.items() if value is not None}
    loaded = _load(pipeline, device, dtype)
    for name in given.keys() - inspect.signature(loaded.__call__).parameters.keys():
        raise typer.BadParameter(
            f"{name}: expected none, {type(loaded).__name__} has no such option, got {given[name]}"
        )
    if not out.parent.is_dir():
        raise typer.BadParameter(f"--out: expected a file in a folder that exists, got {out}")

    from lite_attention.backend import diffusers

    generated = [f"{len(lines)} prompts of {prompts.name}", f"seed {seed}", *(f"{k} {v}" for k, v in given.items())]
    checked = None
    try:
        found = diffusers.calibrate(
            loaded,
            _run(loaded, lines, seed, given),
            target,
            inputs=", ".join(generated),
            rule=known_rule,
            refresh_interval=refresh_interval,
        )
        if check_lines:
            checked = diffusers.measure(loaded, _run(loaded, check_lines, seed + len(lines), given), found)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    found.save(out)
    _show(found.thresholds, found.reached, checked)
    print(f"Written: {out}")


def _read(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"expected a text file with a prompt a line, got {path}: {error}") from None
    if not lines:
        raise typer.BadParameter(f"expected a prompt a line, got {path} without any")
    return lines


def _load(pipeline: str, device: str, dtype: str) -> Any:
    import torch

    number = getattr(torch, dtype, None)
    if not isinstance(number, torch.dtype) or not number.is_floating_point:
        raise typer.BadParameter(f"--dtype: expected one such as bfloat16, got {dtype}")
    try:
        from diffusers import DiffusionPipeline
    except ImportError:
        raise typer.BadParameter("the library diffusers is needed: pip install 'lite-attention[diffusers]'") from None
    try:
        return DiffusionPipeline.from_pretrained(pipeline, torch_dtype=number).to(device)
    except (OSError, ValueError, RuntimeError) as error:
        raise typer.BadParameter(f"expected a pipeline that diffusers loads, got {pipeline}: {error}") from None


def _run(pipeline: Any, prompts: list[str], seed: int, size: Mapping[str, int]) -> Callable[[], None]:
    """Generates for all prompts, each from the same noise whenever it is called."""
    import torch
    from tqdm import tqdm

    pipeline.set_progress_bar_config(leave=False)

    def run() -> None:
        for number, prompt in enumerate(tqdm(prompts, unit="prompt", leave=False)):
            noise = torch.Generator().manual_seed(seed + number)
            pipeline(prompt=prompt, generator=noise, output_type="latent", **size)

    return run


def _show(thresholds: Mapping[str, float], reached: Mapping[str, Cost], checked: Mapping[str, Cost] | None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("layer", "threshold", "error", "mass dropped", "blocks skipped", title="Cost of skipping")
    if checked is not None:
        for title in ("error, --check", "dropped", "skipped"):
            table.add_column(title)
    for layer, threshold in thresholds.items():
        costs = [reached[layer], *([checked[layer]] if checked else [])]
        numbers = [f"{number:.2%}" for cost in costs for number in (cost.error, cost.dropped, cost.sparsity)]
        table.add_row(layer, f"{threshold:.2f}", *numbers)
    Console().print(table)
