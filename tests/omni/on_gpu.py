"""Everything of vLLM-Omni and diffusers that needs Hopper GPUs, side by side, with its figures.

    python -m tests.omni.on_gpu --out DIR          # one GPU: tests, then benchmarks.wan_step_time; about 6 minutes
    python -m tests.omni.on_gpu --out DIR --two    # two GPUs: tests of sequence and guidance parallelism, 2 minutes

Needs vLLM-Omni and pytest; works from a checkout that is not installed. What each test recorded goes into
DIR/omni_gpu.json, and the MP4 files of the server and the trace of a pipeline into DIR.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.results import write_result

ROOT = Path(__file__).parents[2]
OFFLINE = "tests/omni/test_offline.py"
PARALLEL = "tests/omni/test_parallel.py"
ONE_GPU = {
    "offline, one expert": [OFFLINE, "-k", "one-expert"],
    "offline, two experts": [OFFLINE, "-k", "two-experts"],
    "server": ["tests/omni/test_server.py", "tests/omni/test_plugin.py"],
    "sleep": ["tests/omni/test_engines.py", "-k", "sleeping"],
    "offload": ["tests/omni/test_engines.py", "-k", "offload"],
    "diffusers": ["tests/diffusers/test_gpu.py"],
}
TWO_GPUS = {way: [PARALLEL, "-k", way] for way in ("ulysses", "allgather", "cfg", "ring")}
"""Arguments of pytest."""


def make_site(folder: Path) -> None:
    """What an installation would have put on the path: entry points; and a package that vLLM-Omni only imports."""
    if not any(entry.name == "lite_attn" for entry in metadata.entry_points(group="vllm_omni.general_plugins")):
        groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
        info = folder / "lite_attention-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lite-attention\nVersion: 0\n")
        lines = [
            f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in of.items())
            for group, of in groups.items()
        ]
        (info / "entry_points.txt").write_text("\n".join(lines))
    if importlib.util.find_spec("torchaudio") is None:
        (folder / "torchaudio").mkdir()
        (folder / "torchaudio" / "__init__.py").touch()
        (folder / "torchaudio" / "functional.py").write_text("melscale_fbanks = None\n")
        (folder / "torchaudio" / "transforms.py").write_text("Resample = None\n")


def run_side_by_side(parts: dict[str, list[str]], folder: Path, timeout: float) -> Iterator[tuple[str, str]]:
    """Run pytest for each part; its name and how it ended, as it ends."""
    running = {}
    for number, (name, arguments) in enumerate(parts.items()):
        command = [sys.executable, "-m", "pytest", "-q", *arguments, "-p", "no:cacheprovider"]
        command += [f"--junitxml={folder / name}.xml", f"--basetemp={folder / str(number)}"]
        log = (folder / f"{name}.log").open("w")
        running[name] = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, start_new_session=True)
    end = time.monotonic() + timeout
    while running:
        time.sleep(0.5)
        for name, process in list(running.items()):
            late = time.monotonic() > end
            if process.poll() is None and not late:
                continue
            if process.poll() is None:
                os.killpg(process.pid, 9)
                process.wait()
            del running[name]
            yield name, f"stopped after {timeout:.0f} s" if late else f"ended with {process.returncode}"


def outcomes(part: str, report: Path) -> Iterator[dict[str, Any]]:
    """A row for each test of a part, with what it recorded."""
    if not report.exists():
        return
    for case in ElementTree.parse(report).iter("testcase"):
        failed = [child for child in case if child.tag in ("failure", "error", "skipped")]
        yield {
            "part": part,
            "test": case.get("name"),
            "outcome": failed[0].tag if failed else "passed",
            "seconds": float(case.get("time") or 0),
            **({"message": (failed[0].get("message") or "")[:300]} if failed else {}),
            **{str(of.get("name")): of.get("value") for of in case.iter("property")},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--two", action="store_true", help="what needs two GPUs")
    parser.add_argument("--timeout", type=float, default=200, help="seconds after which tests are stopped")
    parser.add_argument("--steps-timeout", type=float, default=200, help="seconds after which wan_step_time is stopped")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    folder = Path(tempfile.mkdtemp())
    site = folder / "site"
    site.mkdir()
    make_site(site)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(site), str(ROOT), os.environ.get("PYTHONPATH"))))
    rows: list[dict[str, Any]] = []
    ended: dict[str, str] = {}
    for part, how in run_side_by_side(TWO_GPUS if args.two else ONE_GPU, folder, args.timeout):
        print(f"{part}: {how}", flush=True)
        ended[part] = how
        rows += outcomes(part, folder / f"{part}.xml")
        write_result("omni_gpu_two" if args.two else "omni_gpu", {"parts": ended}, rows, args.out)
        if not how.endswith(" 0"):
            with (args.out / "failures.log").open("a") as log:
                log.write(f"==== {part}: {how}\n{(folder / f'{part}.log').read_text()[-200_000:]}\n")
    for found in (*folder.rglob("[01].mp4"), *sorted(folder.rglob("wan.trace"))[:1]):
        if not found.is_symlink():
            shutil.copy(found, args.out)
    if not args.two:
        command = [sys.executable, "-m", "benchmarks.wan_step_time", "--out", str(args.out)]
        try:
            subprocess.run(command, cwd=ROOT, timeout=args.steps_timeout)
        except subprocess.TimeoutExpired:
            print(f"wan_step_time: stopped after {args.steps_timeout:.0f} s")
    for row in rows:
        if row["outcome"] != "passed":
            print(f"{row['outcome']}: {row['part']}: {row['test']}: {row.get('message')}")
    print(f"{sum(row['outcome'] == 'passed' for row in rows)} of {len(rows)} tests passed; {ended}")


if __name__ == "__main__":
    main()
