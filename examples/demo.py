"""A server with LITE_ATTN and a real model: chats at once, each with its own threshold, and what they skipped.

    make demo

Each chat is asked twice, skipping and dense (`lite_attn_enable: false`), so that the answers stand side by side; the
prompts are read once before, so that the speeds are those of decoding.
The sparsity comes from the server's own `/metrics`, which count by threshold.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
from rich.console import Console
from rich.markup import escape
from rich.table import Table

START_TIMEOUT_S = 180
LONG_TEXT = Path(os.__file__).with_name("argparse.py").read_text()[:27_000]
LONG_QUESTION = f"{LONG_TEXT}\n\nIn one sentence: what is this Python module for?"


@dataclass
class Chat:
    """A question, and the threshold with which it is asked."""

    title: str
    text: str
    threshold: int
    max_tokens: int = 40


CHATS = [
    Chat("capital", "What is the capital of France?", -10),
    Chat("poem", "Write two lines about the sea.", -8),
    Chat("code", "Write a Python function that adds two numbers.", -4),
    Chat("a long input", LONG_QUESTION, -7),
]


@dataclass
class Answer:
    """What came back: text, tokens of the prompt, and decode speed."""

    text: str
    prompt_tokens: int
    tokens_per_s: float


def ask(client: httpx.Client, chat: Chat, options: dict[str, float | bool]) -> Answer:
    body = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": chat.text}],
        "max_tokens": chat.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "vllm_xargs": options,
    }
    text, usage, first = "", {}, 0.0
    with client.stream("POST", "/v1/chat/completions", json=body) as stream:
        if stream.status_code != 200:
            stream.read()
            raise SystemExit(f"the server answered {stream.status_code}: {stream.text}")
        for line in stream.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                if choice["delta"].get("content"):
                    text += choice["delta"]["content"]
                    first = first or time.monotonic()
    speed = (usage["completion_tokens"] - 1) / max(time.monotonic() - first, 1e-9)
    return Answer(text.strip(), usage["prompt_tokens"], speed)


def sparsity(metrics: str, threshold: int) -> float:
    """Share of blocks that rows with this threshold did not read."""

    def value(name: str) -> float:
        found = re.search(rf'^{name}{{threshold="{threshold}"}} (\S+)$', metrics, re.MULTILINE)
        return float(found[1]) if found else 0.0

    return 1 - value("lite_attn_blocks_visited_total") / max(value("lite_attn_blocks_total"), 1)


def start_server(model: str, port: int, log: Path) -> subprocess.Popen[bytes]:
    program = str(Path(sys.executable).with_name("lite-attention"))
    command = [program, "serve", model, "--served-model-name", "smollm2", "--port", str(port)]
    command += ["--enforce-eager", "--max-model-len", "8192", "--max-num-seqs", "8"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ}
    with log.open("wb") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)


def wait_until_healthy(client: httpx.Client, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    server.terminate()
    raise SystemExit(f"the server did not start; its log ends:\n{log.read_text()[-3000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "lite-attention/smollm2-135m-instruct"
    parser.add_argument("--model", default=str(default), help="folder from `lite-attention model smollm2`")
    parser.add_argument("--log", type=Path, default=Path("demo-server.log"), help="where the server's log goes")
    args = parser.parse_args()
    console = Console()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    console.print(f"Starting [bold]lite-attention serve[/bold] on port {port}; its log: {args.log}")
    server = start_server(args.model, port, args.log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as client, ThreadPoolExecutor() as pool:
            wait_until_healthy(client, server, args.log)
            acts = re.search(r"LITE_ATTN acts on .*", args.log.read_text())
            console.print(acts[0] if acts else "LITE_ATTN does not act: see the log")
            console.print("Reading the prompts ...")
            list(pool.map(lambda c: ask(client, replace(c, max_tokens=1), {"lite_attn_enable": False}), CHATS))
            console.print(f"{len(CHATS)} chats at once, each with its own threshold ...")
            skipping = list(pool.map(lambda c: ask(client, c, {"lite_attn_threshold": c.threshold}), CHATS))
            console.print("... and again without skipping.")
            dense = list(pool.map(lambda c: ask(client, c, {"lite_attn_enable": False}), CHATS))
            metrics = client.get("/metrics").text
        table = Table("chat", "prompt tokens", "threshold", "sparsity", "tokens/s", "tokens/s dense")
        for chat, answer, plain in zip(CHATS, skipping, dense, strict=True):
            speeds = f"{answer.tokens_per_s:.1f}", f"{plain.tokens_per_s:.1f}"
            share = f"{sparsity(metrics, chat.threshold):.0%}"
            table.add_row(chat.title, str(answer.prompt_tokens), str(chat.threshold), share, *speeds)
        for chat, answer, plain in zip(CHATS, skipping, dense, strict=True):
            console.rule(chat.title, align="left")
            console.print("[bold]skipping:[/bold]", escape(answer.text))
            console.print("[bold]dense:[/bold]   ", "the same" if plain.text == answer.text else escape(plain.text))
        console.rule()
        console.print(table)
        console.print("sparsity: share of (head, block of 16 keys) pairs that decode steps did not read")
    finally:
        server.send_signal(signal.SIGINT)
        status = server.wait(60)
    console.print(f"The server shut down (status {status}).")


if __name__ == "__main__":
    main()
