"""Does anybody's request change another's tokens? Many requests against a running server, compared with each run alone.

Draws some different jobs: prompts of random length out of Python's own sources, random numbers of tokens, dense or with
random options of LITE_ATTN. Each runs alone first; then thousands of requests, drawn from them, come at random times,
and some hang up in the middle. Whatever a stream said must be what the job said alone; no slot may stay taken.

Batching itself changes rounding in bfloat16: serve in float32, or with batch-invariant kernels. These differ in the
last bits all the same when all but the last token of a prompt lie in the prefix cache, so leave that off. Where
streams of dense requests differ, run the same against the engine's own attention. To have sequences preempted, give
the server a small cache. For instance, on a CPU:

    VLLM_CPU_KVCACHE_SPACE=1 vllm serve $(lite-attention model smollm2 | tail -1) --attention-backend LITE_ATTN \
        --enforce-eager --dtype float32 --max-model-len 2048 --max-num-seqs 16 --num-gpu-blocks-override 40
    python -m benchmarks.soak --requests 2000

and on a GPU:

    VLLM_BATCH_INVARIANT=1 vllm serve MODEL --attention-backend LITE_ATTN --no-enable-prefix-caching \
        --max-model-len 2048 --max-num-seqs 16 --num-gpu-blocks-override 200
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from benchmarks.results import DIRECTORY, write_result

SOURCE = Path(os.__file__).with_name("argparse.py").read_text()
SHOWN = 20
"""Streams that differ, of which the words are kept."""

ABORTED = 0.15
"""Share of requests that hang up in the middle."""


@dataclass(frozen=True)
class Job:
    """A request; `prompt` is a piece of SOURCE, as (first character, characters)."""

    prompt: tuple[int, int]
    max_tokens: int
    options: tuple[tuple[str, float], ...]

    @property
    def dense(self) -> bool:
        return ("lite_attn_enable", 0) in self.options

    def body(self, model: str) -> dict[str, Any]:
        start, length = self.prompt
        return {
            "model": model,
            "prompt": SOURCE[start : start + length],
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "vllm_xargs": dict(self.options),
        }


def draw_job(choice: random.Random, characters: int, max_tokens: int) -> Job:
    length = round(characters ** choice.random()) + 4
    options: dict[str, float] = {}
    if choice.random() < 0.75:
        options["lite_attn_threshold"] = round(choice.uniform(-10, -2), 1)
        if choice.random() < 0.3:
            options["lite_attn_refresh_interval"] = choice.randint(2, 9)
        if choice.random() < 0.3:
            options["lite_attn_warmup_steps"] = choice.randint(1, 5)
    else:
        options["lite_attn_enable"] = 0
    start = choice.randrange(len(SOURCE) - length)
    return Job((start, length), choice.randint(1, max_tokens), tuple(sorted(options.items())))


async def run(client: httpx.AsyncClient, model: str, job: Job, stop_after: int | None = None) -> list[str]:
    """What the stream says, piece by piece; `stop_after` so many the client hangs up."""
    pieces: list[str] = []
    async with client.stream("POST", "/v1/completions", json=job.body(model)) as response:
        if response.status_code != 200:
            raise RuntimeError(f"HTTP {response.status_code}: {(await response.aread()).decode()[:500]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise RuntimeError(f"in the stream: {event['error']}")
            pieces += [choice["text"] for choice in event["choices"]]
            if stop_after is not None and len(pieces) >= stop_after:
                break
    return pieces


async def metrics(client: httpx.AsyncClient) -> dict[str, float]:
    """Totals of the metrics that are looked at, over their labels."""
    text = (await client.get("/metrics")).text
    names = ("lite_attn_active_slots", "lite_attn_rows_total", "vllm:num_preemptions_total")
    found = {name: re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE) for name in names}
    return {name: sum(map(float, values)) for name, values in found.items()}


async def soak(args: argparse.Namespace) -> dict[str, Any]:
    choice = random.Random(args.seed)
    jobs = [draw_job(choice, args.characters, args.max_tokens) for _ in range(args.jobs)]
    differing: list[dict[str, Any]] = []
    aborted = 0
    async with httpx.AsyncClient(base_url=args.url, timeout=None) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        started = await metrics(client)
        alone = {job: "".join(await run(client, model, job)) for job in tqdm(jobs, desc="alone", unit="request")}
        progress = tqdm(total=args.requests, desc="together", unit="request")
        gate = asyncio.Semaphore(args.concurrency)

        async def one(job: Job, stop_after: int | None, wait_s: float) -> None:
            nonlocal aborted
            async with gate:
                await asyncio.sleep(wait_s)
                said = "".join(await run(client, model, job, stop_after))
            want = alone[job]
            aborted += stop_after is not None
            if said != want if stop_after is None else not want.startswith(said):
                differing.append(asdict(job) | {"dense": job.dense, "said": said[-200:], "alone": want[-200:]})
            progress.update()

        began = time.perf_counter()
        requests = []
        for _ in range(args.requests):
            job = choice.choice(jobs)
            stop_after = choice.randint(1, job.max_tokens) if choice.random() < ABORTED else None
            requests.append(one(job, stop_after, choice.expovariate(1 / args.pause_s)))
        await asyncio.gather(*requests)
        progress.close()
        seconds = time.perf_counter() - began
        # Workers hear of ended requests with the next step.
        await run(client, model, Job((0, 20), 2, (("lite_attn_enable", 0),)))
        ended = await metrics(client)
    return {
        "requests": args.requests,
        "jobs": len(jobs),
        "aborted": aborted,
        "differing": sum(not different["dense"] for different in differing),
        "differing_dense": sum(different["dense"] for different in differing),
        "examples": differing[:SHOWN],
        "rows_that_skipped": ended["lite_attn_rows_total"] - started["lite_attn_rows_total"],
        "preemptions": ended["vllm:num_preemptions_total"] - started["vllm:num_preemptions_total"],
        "slots_taken_at_the_end": ended["lite_attn_active_slots"],
        "seconds": round(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=2000, help="that run together (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=100, help="that they are drawn from (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=24, help="open at a time (default: %(default)s)")
    parser.add_argument("--characters", type=int, default=5000, help="of the longest prompt (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=48, help="of the longest answer (default: %(default)s)")
    parser.add_argument("--pause-s", type=float, default=0.2, help="seconds before a request (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=DIRECTORY, help="folder for the result (default: %(default)s)")
    args = parser.parse_args()
    result = asyncio.run(soak(args))
    print(json.dumps(result, indent=2))
    options = {key: value for key, value in vars(args).items() if key not in ("out", "url")}
    write_result("soak", options, [result], args.out)
    if result["differing"] or result["differing_dense"] or result["slots_taken_at_the_end"]:
        raise SystemExit("some streams differ, or slots stayed taken")


if __name__ == "__main__":
    main()
