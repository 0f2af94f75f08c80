"""`lite-attention calibrate`: thresholds for the layers of a model that cost what a user allows."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lite_attention.cli import options
from lite_attention.cli.jobs import Prompt, read_prompts

if TYPE_CHECKING:
    from lite_attention.calibration import Calibration, DecodeCalibration
    from lite_attention.costs import Cost


class EngineName(StrEnum):
    """What runs the model."""

    DIFFUSERS = "diffusers"
    VLLM = "vllm"


def calibrate(
    model: Annotated[
        str, typer.Argument(help="Folder or name of a pipeline that diffusers loads, or of a language model.")
    ],
    prompts: Annotated[
        Path,
        typer.Option(
            help="What to calibrate on: a text file with a prompt a line; for language models one with a JSON object "
            "a line, as generate takes them.",
            dir_okay=False,
        ),
    ],
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
    engine: Annotated[
        EngineName | None,
        typer.Option(help="What runs the model; without it, vllm for a folder of a language model, else diffusers."),
    ] = None,
    refresh_interval: Annotated[int, typer.Option(min=0, help="Visit all blocks every so many steps; 0 never.")] = 0,
    seed: Annotated[
        int, typer.Option(help="Of the first prompt's noise, the others having others, or of the answers.")
    ] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Diffusers: denoising steps.")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Diffusers: pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Diffusers: pixels.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Diffusers: frames of a video.")] = None,
    rule: Annotated[
        str | None,
        typer.Option(help="Diffusers: how blocks are skipped: running_max (default), mass or mass_summaries."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Diffusers: where the pipeline runs, cuda (default) or cpu.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Diffusers: type of the weights; bfloat16 by default.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="vLLM: tokens of an answer; 64 by default.")] = None,
    max_model_len: Annotated[int | None, typer.Option(min=4, help="vLLM: tokens of a prompt and its answer.")] = None,
    engine_args: Annotated[str | None, typer.Option(help="vLLM: more arguments of vllm.LLM, a JSON object.")] = None,
) -> None:
    """Find a threshold for each layer of a model.

    The model generates what the prompts say several times. Each attention is computed twice, skipping and dense, and
    the thresholds are moved until skipping costs each layer what --target says. The file is for the same model; that
    of a diffusion model for the same number of tokens, too.

    \b
    Examples:
      lite-attention calibrate PIPELINE --prompts prompts.txt --target error=0.05 --out wan.toml
        enable(pipeline, calibration="wan.toml")
      lite-attention calibrate MODEL --prompts prompts.jsonl --target error=0.05 --out careful.toml
        lite-attention serve MODEL --lite-attn-profile careful=careful.toml
    """
    from lite_attention.calibration import Target

    for_pipelines = {
        "steps": steps, "height": height, "width": width, "frames": frames,
        "rule": rule, "device": device, "dtype": dtype,
    }  # fmt: skip
    for_language_models = {"max_tokens": max_tokens, "max_model_len": max_model_len, "engine_args": engine_args}
    engine = engine or _guess(model)
    for name, value in (for_pipelines if engine == EngineName.VLLM else for_language_models).items():
        if value is not None:
            raise typer.BadParameter(f"--{name.replace('_', '-')}: expected none with --engine {engine}, got {value}")
    try:
        Target.parse(target)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if not out.parent.is_dir():
        raise typer.BadParameter(f"--out: expected a file in a folder that exists, got {out}")
    found: Calibration | DecodeCalibration
    if engine == EngineName.VLLM:
        length = {} if max_model_len is None else {"max_model_len": max_model_len}
        more = options.json_object(engine_args or "{}") | length
        found, checked = _language_model(model, prompts, check, target, max_tokens or 64, seed, refresh_interval, more)
    else:
        size = {"num_inference_steps": steps, "height": height, "width": width, "num_frames": frames}
        given = {name: value for name, value in size.items() if value is not None}
        loaded = functools.partial(_load, model, device or "cuda", dtype or "bfloat16")
        found, checked = _pipeline(loaded, prompts, check, target, given, seed, rule or "running_max", refresh_interval)
    found.save(out)
    _show(found.thresholds, found.reached, checked)
    print(f"Written: {out}")


def _guess(model: str) -> EngineName:
    folder = Path(model)
    language_model = (folder / "config.json").is_file() and not (folder / "model_index.json").exists()
    return EngineName.VLLM if language_model else EngineName.DIFFUSERS


def _pipeline(
    load: Callable[[], Any],
    prompts: Path,
    check: Path | None,
    target: str,
    size: Mapping[str, int],
    seed: int,
    rule: str,
    refresh_interval: int,
) -> tuple[Calibration, Mapping[str, Cost] | None]:
    from lite_attention.options import check_rule

    try:
        known_rule = check_rule(rule)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    lines, check_lines = _read(prompts), _read(check) if check else []
    loaded = load()
    for name in size.keys() - inspect.signature(loaded.__call__).parameters.keys():
        raise typer.BadParameter(f"{name}: expected none, {type(loaded).__name__} has no such option, got {size[name]}")

    from lite_attention.backend import diffusers

    generated = [f"{len(lines)} prompts of {prompts.name}", f"seed {seed}", *(f"{k} {v}" for k, v in size.items())]
    checked = None
    try:
        found = diffusers.calibrate(
            loaded,
            _run(loaded, lines, seed, size),
            target,
            inputs=", ".join(generated),
            rule=known_rule,
            refresh_interval=refresh_interval,
        )
        if check_lines:
            checked = diffusers.measure(loaded, _run(loaded, check_lines, seed + len(lines), size), found)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return found, checked


def _language_model(
    model: str,
    prompts: Path,
    check: Path | None,
    target: str,
    max_tokens: int,
    seed: int,
    refresh_interval: int,
    engine_args: dict[str, Any],
) -> tuple[DecodeCalibration, Mapping[str, Cost] | None]:
    read, read_check = _read_json(prompts), _read_json(check) if check else []

    try:
        from lite_attention.backend.vllm import calibration
    except ImportError as error:
        raise typer.BadParameter(f"language models need vLLM: {error}") from None
    from lite_attention.cli.generate import Engine

    for name in calibration.ENGINE_ARGS.keys() & engine_args.keys():
        raise typer.BadParameter(f"--engine-args: expected none of {', '.join(calibration.ENGINE_ARGS)}, got {name}")
    engine = Engine(model, {}, {"seed": seed} | engine_args | calibration.ENGINE_ARGS)
    checked = None
    try:
        texts = calibration.answer(engine.llm, [engine.tokens(prompt) for prompt in read], max_tokens)
        inputs = f"{len(read)} prompts of {prompts.name}, seed {seed}, answers of up to {max_tokens} tokens"
        found = calibration.calibrate(
            engine.llm, texts, target, model=model, inputs=inputs, refresh_interval=refresh_interval
        )
        if read_check:
            tokens = [engine.tokens(prompt) for prompt in read_check]
            others = calibration.answer(engine.llm, tokens, max_tokens)
            checked = calibration.measure(engine.llm, others, found)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return found, checked


def _read_json(path: Path) -> list[Prompt]:
    try:
        prompts, rejected = read_prompts(path)
    except OSError as error:
        raise typer.BadParameter(f"expected a file with a JSON object a line, got {path}: {error}") from None
    for bad in rejected:
        raise typer.BadParameter(f"{path}:{bad.index + 1}: {bad.reason}")
    if not prompts:
        raise typer.BadParameter(f"expected a prompt a line, got {path} without any")
    return list(prompts.values())


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
    for name, (layer, threshold) in zip(_short(list(thresholds)), thresholds.items(), strict=True):
        costs = [reached[layer], *([checked[layer]] if checked else [])]
        numbers = [f"{number:.2%}" for cost in costs for number in (cost.error, cost.dropped, cost.sparsity)]
        table.add_row(name, f"{threshold:.2f}", *numbers)
    Console().print(table)


def _short(names: list[str]) -> list[str]:
    """Names without the parts between dots that are the same in all."""
    split = [name.split(".") for name in names]
    if len({len(parts) for parts in split}) > 1 or len(names) < 2:
        return names
    differs = [len(set(parts)) > 1 for parts in zip(*split, strict=True)]
    return [".".join(itertools.compress(parts, differs)) for parts in split]
