import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lite_attention.cli.jobs import (
    Batch,
    Prompt,
    Rejected,
    Result,
    ResultFile,
    ResultFileError,
    complete_all,
    read_prompts,
)


def written(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def result(index: int, text: str = "text") -> Result:
    return Result(index=index, text=text, token_ids=[1, 2], finish_reason="stop", sparsity=0.5)


def test_prompts_are_read_by_index(tmp_path: Path) -> None:
    prompts, rejected = read_prompts(
        written(
            tmp_path / "in.jsonl",
            {"prompt": "one\u2028line"},
            "",
            {"messages": [{"role": "user", "content": "hi"}], "threshold": 6, "enable": True, "seed": -3},
        )
    )
    assert not rejected
    assert list(prompts) == [0, 2]
    assert prompts[0].prompt == "one\u2028line"
    assert prompts[0].extra_args() == {}
    assert prompts[2].extra_args() == {"lite_attn_threshold": -6.0, "lite_attn_enable": True}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "expected a JSON object"),
        ("[1]", "valid dictionary or instance of Prompt"),
        ("\x00", "expected a JSON object"),
        ("[" * 100_000, "expected a JSON object"),
        ({}, "exactly one of prompt and messages"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "exactly one"),
        ({"prompt": 3}, "prompt: "),
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "user"}]}, "messages.0.content: "),
        ({"prompt": "a", "threshold": "hot"}, "threshold: expected a number"),
        ({"prompt": "a", "threshold": float("nan")}, "threshold: expected a number"),
        ({"prompt": "a", "enable": 3}, "enable: expected true or false"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens: "),
        ({"prompt": "a", "temperature": float("nan")}, "temperature: "),
        ({"prompt": "a", "seed": 2**63}, "seed: "),
        ({"prompt": "a", "treshold": -6}, "treshold: "),
    ],
)
def test_a_bad_line_does_not_lose_the_others(tmp_path: Path, line: Any, reason: str) -> None:
    prompts, rejected = read_prompts(written(tmp_path / "in.jsonl", {"prompt": "a"}, line, {"prompt": "b"}))
    assert list(prompts) == [0, 2]
    assert [bad.index for bad in rejected] == [1]
    assert reason in rejected[0].reason


def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"prompt": "\xff"}\n{"prompt": "a"}')
    prompts, rejected = read_prompts(path)
    assert list(prompts) == [1]
    assert [bad.index for bad in rejected] == [0]


@given(st.lists(st.binary(max_size=40) | st.text(max_size=20).map(lambda text: json.dumps(text).encode())))
def test_no_bytes_raise(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("prompts") / "in.jsonl"
    path.write_bytes(b"\n".join(lines))
    prompts, rejected = read_prompts(path)
    assert not prompts
    assert len(rejected) <= path.read_bytes().count(b"\n") + 1


def test_results_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    odd = 'line\nbreak \u2028 "quoted" \U0001f600'
    ResultFile(path).save([result(3), result(1, odd)])
    ResultFile(path).save([result(2)])
    again = ResultFile(path)
    assert list(again.results) == [1, 2, 3]
    assert again.results[1].text == odd
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_cut_off_last_line_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    ResultFile(path).save([result(0), result(1), result(2)])
    whole = path.read_bytes()
    for cut in range(1, len(whole) // 3 - 1):
        path.write_bytes(whole[:-cut])
        kept = set(ResultFile(path).results)
        assert {0, 1} <= kept
        assert (2 in kept) == (cut == 1)  # without its newline the last line is still whole


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    path = written(tmp_path / "out.jsonl", {"precious": 1}, {"precious": 2})
    before = path.read_bytes()
    with pytest.raises(ResultFileError, match=r"out\.jsonl:1"):
        ResultFile(path)
    assert path.read_bytes() == before


def test_a_failed_write_keeps_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.jsonl"
    file = ResultFile(path)
    file.save([result(0)])
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        file.save([result(1)])
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_batches_are_saved_one_by_one_and_resumed(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    prompts = [(index, Prompt(prompt=str(index))) for index in range(7)]
    batches = []

    def complete(batch: Batch) -> Iterator[Result | Rejected]:
        batches.append([index for index, _ in batch])
        if len(batches) == 3:
            raise RuntimeError("the engine died")
        for index, _ in batch:
            yield Rejected(index, "too long") if index == 1 else result(index)

    progress: list[int] = []
    with pytest.raises(RuntimeError, match="the engine died"):
        complete_all(prompts, ResultFile(path), 2, complete, progress.append)
    assert batches == [[0, 1], [2, 3], [4, 5]]
    assert progress == [2, 2]
    file = ResultFile(path)
    assert list(file.results) == [0, 2, 3]

    left = [(index, prompt) for index, prompt in prompts if index not in file.results]
    rejected = complete_all(left, file, 2, complete, progress.append)
    assert batches[3:] == [[1, 4], [5, 6]]
    assert rejected == [Rejected(1, "too long")]
    assert list(ResultFile(path).results) == [0, 2, 3, 4, 5, 6]
