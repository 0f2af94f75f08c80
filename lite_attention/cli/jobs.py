"""Prompts and results of batch generation as files: reading, checking, resuming, writing. No engine here."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lite_attention.serving.params import PREFIX, Name, RequestOptions, Steps, Switch, Threshold


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(strict=True, extra="forbid")

    role: str
    content: str


class Prompt(BaseModel):
    """A line of a file of prompts. What it leaves out, the command line or the engine decides."""

    model_config = ConfigDict(strict=True, extra="forbid")

    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    threshold: Threshold | None = None
    enable: Switch | None = None
    refresh_interval: Steps | None = None
    warmup_steps: Steps | None = None
    profile: Name = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("expected exactly one of prompt and messages")
        return self

    def extra_args(self) -> dict[str, Any]:
        """The request parameters that the line sets, as an engine takes them."""
        options = {f"{PREFIX}{name}": getattr(self, name) for name in RequestOptions.model_fields}
        return {name: value for name, value in options.items() if value is not None}


class Result(BaseModel):
    """A line of a file of results; `index` counts the lines of the file of prompts from 0."""

    model_config = ConfigDict(strict=True, extra="forbid")

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    sparsity: float | None


@dataclass(frozen=True, slots=True)
class Rejected:
    """A prompt that cannot be completed, by its index, and why."""

    index: int
    reason: str


class ResultFileError(ValueError):
    """A file given for results holds something else."""


def read_prompts(path: Path) -> tuple[dict[int, Prompt], list[Rejected]]:
    """The prompts of a file by index, and the lines that are not prompts. Empty lines are passed over."""
    prompts: dict[int, Prompt] = {}
    rejected = []
    with path.open("rb") as lines:
        for index, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                prompts[index] = Prompt.model_validate(json.loads(line))
            except ValidationError as error:
                rejected.append(Rejected(index, explain(error)))
            except (ValueError, RecursionError) as error:
                rejected.append(Rejected(index, f"expected a JSON object: {error}"))
    return prompts, rejected


def explain(error: ValidationError) -> str:
    """Each error as the field, and what was expected."""
    messages = []
    for item in error.errors(include_url=False):
        place = ".".join(map(str, item["loc"]))
        cause = item.get("ctx", {}).get("error", item["msg"])
        messages.append(f"{place}: {cause}" if place else str(cause))
    return "; ".join(messages)


class ResultFile:
    """Results by index, and the file that holds them, which is whole at every moment."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results = self._read() if path.exists() else {}

    def _read(self) -> dict[int, Result]:
        results: dict[int, Result] = {}
        lines = self.path.read_bytes().splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                result = Result.model_validate_json(line)
            except ValidationError:
                if number == len(lines):
                    break  # cut off; it is made again
                raise ResultFileError(f"{self.path}:{number}: expected a line that generate wrote") from None
            results[result.index] = result
        return results

    def save(self, results: Iterable[Result]) -> None:
        """Adds results and replaces the file."""
        self.results.update((result.index, result) for result in results)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.new")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                for index in sorted(self.results):
                    file.write(self.results[index].model_dump_json() + "\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)


Batch = Sequence[tuple[int, Prompt]]


def complete_all(
    prompts: Batch,
    results: ResultFile,
    batch_size: int,
    complete: Callable[[Batch], Iterable[Result | Rejected]],
    progress: Callable[[int], object],
) -> list[Rejected]:
    """Completes prompts batch by batch, saving after each; returns those that cannot be completed."""
    rejected = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        outcomes = list(complete(batch))
        rejected += [outcome for outcome in outcomes if isinstance(outcome, Rejected)]
        results.save(outcome for outcome in outcomes if isinstance(outcome, Result))
        progress(len(batch))
    return rejected
