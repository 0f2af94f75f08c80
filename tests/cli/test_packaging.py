"""What is written down twice agrees."""

import tomllib
from pathlib import Path

import pytest

from lite_attention.cli import doctor
from lite_attention.serving.metrics import FALLBACK_REASONS

ROOT = Path(__file__).parents[2]


def test_every_package_is_listed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    roots = {"lite_attention": ROOT / "lite_attention"}
    roots |= {f"lite_attention.{name}": ROOT / name for name in ("backend", "serving")}
    found = set()
    for name, folder in roots.items():
        for module in folder.rglob("*.py"):
            found.add(".".join([name, *module.parent.relative_to(folder).parts]))
    assert listed == found


def test_no_link_is_broken() -> None:
    for name in ("backend", "serving"):
        assert (ROOT / "lite_attention" / name).resolve() == ROOT / name


@pytest.mark.engine
def test_reasons_and_versions_are_those_of_the_backend() -> None:
    pytest.importorskip("vllm")
    from lite_attention.backend.vllm import support

    assert set(FALLBACK_REASONS) == {*support.REASONS, "bad_options"}
    tested = {version for versions in support.TESTED_VERSIONS.values() for version in versions}
    assert set(doctor.TESTED_VLLM) == tested
