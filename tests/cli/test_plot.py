"""`lite-attention plot`, on traces made here."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lite_attention import Report
from lite_attention.cli import app

pytest.importorskip("safetensors")


def plot(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["plot", *map(str, arguments)])


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    report = Report(["a", "b"])
    for step in range(3):
        for layer in report.layers:
            report.add(layer, "cond", step, 0.1 * step)
    report.save(tmp_path / "run.trace")
    return tmp_path / "run.trace"


@pytest.mark.parametrize(("name", "start"), [("picture.png", b"\x89PNG"), ("picture.pdf", b"%PDF")])
def test_a_trace_becomes_a_picture(trace: Path, tmp_path: Path, name: str, start: bytes) -> None:
    pytest.importorskip("matplotlib")
    done = plot(trace, "--out", tmp_path / name)
    assert (done.exit_code, done.output) == (0, f"Written: {tmp_path / name}\n")
    assert (tmp_path / name).read_bytes().startswith(start)


def refused(message: str, *arguments: object) -> None:
    failed = plot(*arguments)
    # The usage error is wrapped in lines and a frame.
    said = " ".join(failed.output.replace("│", " ").split())
    assert failed.exit_code == 2 and message in said and "Traceback" not in said


def test_what_cannot_be_drawn_is_a_usage_error(trace: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "picture.png"
    refused("does not exist", tmp_path / "none", "--out", out)
    refused("Missing option '--out'", trace)
    refused("expected a file in a folder that exists", trace, "--out", tmp_path / "none" / "picture.png")
    refused("not supported", trace, "--out", tmp_path / "picture.docx")
    (tmp_path / "notes.txt").write_text("my notes")
    refused("expected a file that Report.save wrote", tmp_path / "notes.txt", "--out", out)
    Report(["a"]).save(tmp_path / "empty.trace")
    refused("expected one of a generation, got one in which nothing ran", tmp_path / "empty.trace", "--out", out)
    assert not out.exists()


def test_without_matplotlib_it_says_what_to_install(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "lite_attention.pictures", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.colors", None)
    refused("lite-attention[plot]", trace, "--out", tmp_path / "picture.png")
