"""A real server over HTTP: options of each request, metrics, and requests that nobody should send.

On a GPU the model runner is the one that VLLM_USE_V2_MODEL_RUNNER names.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from lite_attention.backend.vllm.plugin import METRICS_DIRECTORY_VARIABLE
from tests.engine.conftest import SOURCE
from tests.engine.test_offline import save_profile

pytestmark = pytest.mark.any_platform

START_TIMEOUT_S = 300
MALFORMED_REQUESTS = 1000


class Server:
    """`vllm serve` with LITE_ATTN, in a process group of its own."""

    def __init__(self, model: str, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [str(Path(sys.executable).with_name("vllm")), "serve", model, "--attention-backend", "LITE_ATTN"]
        command += ["--served-model-name", "smollm2", "--port", str(port)]
        command += [] if torch.cuda.is_available() else ["--enforce-eager"]  # vLLM miscompiles the model on CPUs
        command += ["--max-model-len", "2048", "--max-num-seqs", "8"]
        lite_attn: dict[str, Any] = {"threshold": -6}
        if not torch.cuda.is_available():  # there CUDA graphs hold the attention
            lite_attn |= {"check_share": 0.5}
        lite_attn["profiles"] = {"half": save_profile(log.with_name("half.toml"), [-3.0] * 15 + [-math.inf] * 15)}
        command += ["--additional-config", json.dumps({"lite_attn": lite_attn})]
        environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        environment.pop(METRICS_DIRECTORY_VARIABLE, None)  # of an engine in the test's own process
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.healthy():
            assert self.process.poll() is None, f"the server ended:\n{log.read_text()[-5000:]}"
            assert time.monotonic() < deadline, f"no answer in {START_TIMEOUT_S} s:\n{log.read_text()[-5000:]}"
            time.sleep(0.5)

    def healthy(self) -> bool:
        try:
            return self.client.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def stop(self) -> int:
        """Ask for an orderly end; the exit status."""
        self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(60)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)

    def complete(self, prompt: str, options: dict[str, Any] | None, max_tokens: int = 8, **more: Any) -> httpx.Response:
        body = {"model": "smollm2", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **more}
        return self.post("/v1/completions", body, options)

    def chat(self, text: str, options: dict[str, Any] | None, max_tokens: int = 24, **more: Any) -> httpx.Response:
        body = {"model": "smollm2", "max_tokens": max_tokens, "temperature": 0, **more}
        return self.post("/v1/chat/completions", body | {"messages": [{"role": "user", "content": text}]}, options)

    def post(self, path: str, body: dict[str, Any], options: dict[str, Any] | None) -> httpx.Response:
        if options is not None:
            body["vllm_xargs"] = options
        # json.dumps writes NaN and Infinity, which httpx's own encoder refuses and vLLM's parser takes.
        return self.client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})

    def metric(self, name: str, **labels: str) -> float:
        label = "".join(f'{key}="{value}"' for key, value in labels.items())
        pattern = rf"^{name}{re.escape('{' + label + '}') if label else ''} (\S+)$"
        found = re.search(pattern, self.client.get("/metrics").text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def processes(self) -> list[int]:
        """Resident bytes of each of the server's processes."""
        group = subprocess.run(["ps", "-o", "rss=", "-g", str(self.process.pid)], stdout=subprocess.PIPE, text=True)
        return [1024 * int(line) for line in group.stdout.split()]

    def resident_bytes(self) -> int:
        return sum(self.processes())


@pytest.fixture(scope="module")
def server(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(model, tmp_path_factory.mktemp("server") / "log")
    yield running
    if running.process.poll() is None:
        assert running.stop() in (0, -signal.SIGINT, 128 + signal.SIGINT)


def test_the_log_says_once_what_lite_attn_does(server: Server) -> None:
    log = server.log.read_text()
    assert log.count("LITE_ATTN acts on 30 layers") == 1
    assert "LITE_ATTN was tested with" not in log


def test_a_chat_answers_with_and_without_skipping(server: Server) -> None:
    for options in (None, {"lite_attn_threshold": -8}, {"lite_attn_enable": False}, {"other_key": 1}):
        answer = server.chat("What is the capital of France?", options)
        assert answer.status_code == 200, answer.text
        assert "Paris" in answer.json()["choices"][0]["message"]["content"]


def test_requests_with_different_thresholds_are_counted_apart(server: Server) -> None:
    prompt = SOURCE[:5000]
    thresholds = (-3, 9, None)

    def total(threshold: int) -> tuple[float, float]:
        label = str(-abs(threshold))
        visited = server.metric("lite_attn_blocks_visited_total", threshold=label)
        return visited, server.metric("lite_attn_blocks_total", threshold=label)

    before = {threshold: total(threshold) for threshold in (-3, -9, -6)}
    with ThreadPoolExecutor() as pool:
        options = [None if t is None else {"lite_attn_threshold": t} for t in thresholds]
        answers = list(pool.map(lambda o: server.complete(prompt, o, 24), options))
    assert [answer.status_code for answer in answers] == [200] * 3
    sparsity = {}
    for threshold, (visited, blocks) in before.items():
        now_visited, now_blocks = total(threshold)
        assert now_blocks > blocks
        sparsity[threshold] = 1 - (now_visited - visited) / (now_blocks - blocks)
    assert sparsity[-3] > sparsity[-6] > sparsity[-9] > 0
    assert server.metric("lite_attn_slots") == 8
    assert server.metric("lite_attn_state_bytes") > 0
    server.complete("x", None, 1)
    assert server.metric("lite_attn_active_slots") <= 1


def test_a_request_may_name_a_profile(server: Server) -> None:
    def total() -> tuple[float, ...]:
        return tuple(server.metric(f"lite_attn_{name}_total", threshold="-3") for name in ("blocks_visited", "blocks"))

    before = total()
    checked = server.metric("lite_attn_output_error_count", threshold="-3")
    tokens = 21  # behind the first; of so many the half that is checked is 10 or 11, whatever the request's name
    answer = server.complete(SOURCE[:5000], {"lite_attn_profile": "half"}, tokens + 1)
    assert answer.status_code == 200, answer.text
    visited, blocks = (now - then for now, then in zip(total(), before, strict=True))
    assert 0.25 < 1 - visited / blocks < 0.5  # half of the layers read everything
    if not torch.cuda.is_available():
        assert abs(server.metric("lite_attn_output_error_count", threshold="-3") - checked - tokens / 2) <= 0.5
        assert server.metric("lite_attn_output_error_sum", threshold="-3") > 0
    for stream in (False, True):
        answer = server.complete("hello", {"lite_attn_profile": "whole"}, stream=stream)
        assert answer.status_code == 400
        assert "lite_attn_profile: expected one of half, got 'whole'" in answer.json()["error"]["message"]


def test_streaming_works(server: Server) -> None:
    body = {"model": "smollm2", "prompt": SOURCE[:2000], "max_tokens": 8, "stream": True, "temperature": 0}
    body["vllm_xargs"] = {"lite_attn_threshold": -4}
    with server.client.stream("POST", "/v1/completions", json=body) as stream:
        lines = [line for line in stream.iter_lines() if line.startswith("data:")]
    assert stream.status_code == 200
    assert lines[-1] == "data: [DONE]"
    assert len(lines) > 3


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"lite_attn_threshold": "hot"}, "lite_attn_threshold"),
    ({"lite_attn_threshold": float("nan")}, "lite_attn_threshold"),
    ({"lite_attn_threshold": float("inf")}, "lite_attn_threshold"),
    ({"lite_attn_threshold": 1e6}, "lite_attn_threshold"),
    ({"lite_attn_threshold": [1, 2]}, "lite_attn_threshold"),
    ({"lite_attn_threshold": 10**400}, "lite_attn_threshold"),
    ({"lite_attn_enable": "yes"}, "lite_attn_enable"),
    ({"lite_attn_enable": 2}, "lite_attn_enable"),
    ({"lite_attn_refresh_interval": -1}, "lite_attn_refresh_interval"),
    ({"lite_attn_refresh_interval": 1.5}, "lite_attn_refresh_interval"),
    ({"lite_attn_warmup_steps": 10**9}, "lite_attn_warmup_steps"),
    ({"lite_attn_warmup_steps": "4"}, "lite_attn_warmup_steps"),
    ({"lite_attn_banana": 1}, "lite_attn_banana"),
    ({"lite_attn_profile": 3}, "lite_attn_profile"),
    ({"lite_attn_profile": "half", "lite_attn_threshold": -8}, "lite_attn_threshold"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("options", "field"), BAD_OPTIONS, ids=[str(options)[:60] for options, _ in BAD_OPTIONS])
def test_bad_options_are_400_and_name_the_field(
    server: Server, options: dict[str, Any], field: str, stream: bool
) -> None:
    for send in (server.complete, server.chat):
        answer = send("hello", options, stream=stream)
        assert answer.status_code == 400, answer.text
        if "10000000000000000000" not in json.dumps(options):  # refused by the JSON parser before us
            assert field in answer.text
            assert "expected" in answer.text


def malformed(random: random.Random) -> Any:
    """A value that no option takes."""
    leaf = [None, "x" * random.choice([1, 5000]), float("nan"), float("inf"), 1e300, -(10**30), "", "\u0000", True]
    value = random.choice([*leaf, [1, "a"], {"a": {"b": [1, {}]}}, [[]], [None]])
    return {random.choice(["a", "b"]): value} if random.random() < 0.2 else value


def test_a_thousand_malformed_requests_harm_nobody(server: Server) -> None:
    rng = random.Random(0)
    names = ["threshold", "enable", "refresh_interval", "warmup_steps", "profile"]

    def send(number: int) -> int:
        value = malformed(rng)
        name = "lite_attn_" + rng.choice(names)
        if value is True:  # a threshold of true is 1, and a real switch
            name = "lite_attn_" + rng.choice(["nonsense", "", "Threshold"])
        method = server.complete if number % 2 else server.chat
        return method("hello", {name: value}, 1, stream=number % 3 == 0).status_code

    with ThreadPoolExecutor(4) as pool:
        first = list(pool.map(send, range(200)))
        before = server.resident_bytes()
        rest = list(pool.map(send, range(200, MALFORMED_REQUESTS)))
    codes = {code: len(list(group)) for code, group in itertools.groupby(sorted(first + rest))}
    assert all(400 <= code < 500 for code in codes), codes
    assert server.healthy()
    assert server.resident_bytes() < before + 2**26
    assert "Paris" in server.chat("What is the capital of France?", None).text


def test_the_server_shuts_down_cleanly(server: Server) -> None:
    # Before the end: vLLM's front end may log that its engine is gone when both are told to stop.
    assert "Traceback" not in server.log.read_text()
    assert server.stop() in (0, -signal.SIGINT, 128 + signal.SIGINT)
    deadline = time.monotonic() + 30
    while server.processes() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not server.processes()
