"""LITE_ATTN in real engines on a Hopper GPU, with a small random model.

vLLM computes batch-invariantly here, so that what is the same can be compared exactly. Each engine has a process of
its own. Best run side by side: `python -m pytest tests/engine/test_gpu.py -n 6`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from lite_attention.costs import DecodeShape
from tests.engine.conftest import Engine, Job
from tests.engine.test_offline import DENSE, mixed_jobs, save_profile, skipping

pytestmark = pytest.mark.gpu

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCABULARY, INNER = 1024, 8, 2, 128, 4, 4096, 2048
SPREAD = 1.3
"""Of queries and keys: attention scores have a deviation of 1.7, so that some blocks matter and most do not."""
NEAR = {"float16": 0.02, "bfloat16": 0.16}
"""Log probabilities of engines that compute in different orders differ by less."""
GRAPHS: dict[str, Any] = {"cudagraph_mode": "FULL_AND_PIECEWISE", "cudagraph_capture_sizes": [1, 2, 4, 8, 16]}
NO_GRAPHS: dict[str, Any] = {"cudagraph_mode": "NONE"}
CROWDED: dict[str, Any] = {"max_num_batched_tokens": 256, "num_gpu_blocks_override": 130, "max_model_len": 1024}
"""A cache too small for sixteen requests, and prompts in pieces."""


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    from safetensors.torch import save_file

    random = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return (gain * columns**-0.5 * torch.randn(rows, columns, generator=random)).half()

    norm = torch.ones(HIDDEN, dtype=torch.float16)
    weights = {"model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN, HIDDEN**0.5), "model.norm.weight": norm}
    weights["lm_head.weight"] = matrix(VOCABULARY, HIDDEN, 3.0)
    for layer in range(LAYERS):
        for name, rows, columns, gain in (
            ("self_attn.q_proj", HEADS * HEAD_DIM, HIDDEN, SPREAD),
            ("self_attn.k_proj", KV_HEADS * HEAD_DIM, HIDDEN, SPREAD),
            ("self_attn.v_proj", KV_HEADS * HEAD_DIM, HIDDEN, 1.0),
            ("self_attn.o_proj", HIDDEN, HEADS * HEAD_DIM, 2.0),
            ("mlp.gate_proj", INNER, HIDDEN, 1.0),
            ("mlp.up_proj", INNER, HIDDEN, 1.0),
            ("mlp.down_proj", HIDDEN, INNER, 1.0),
        ):
            weights[f"model.layers.{layer}.{name}.weight"] = matrix(rows, columns, gain)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{name}.weight"] = norm.clone()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 16384,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    folder = tmp_path_factory.mktemp("random-model")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def in_engine(
    scenario: Callable[..., Any], model: str, backend: str, v2: bool, *arguments: Any, **settings: Any
) -> Any:
    """What `scenario` returns, called with an engine of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_in_engine, scenario, model, backend, v2, arguments, settings).result()


def _in_engine(
    scenario: Callable[..., Any], model: str, backend: str, v2: bool, arguments: Any, settings: dict[str, Any]
) -> Any:
    # Compiled code in a folder of its own: engines that start side by side must not write to the same.
    cache = Path(model) / f"cache-{os.getpid()}"
    os.environ |= {
        "VLLM_BATCH_INVARIANT": "1",
        "VLLM_USE_V2_MODEL_RUNNER": str(int(v2)),
        "VLLM_CACHE_ROOT": str(cache),
        "TORCHINDUCTOR_COMPILE_THREADS": "2",
    }
    defaults: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "enforce_eager": False,
        "gpu_memory_utilization": 0.05,
        "kv_cache_memory_bytes": 2**30,
        "compilation_config": GRAPHS,
    }
    return scenario(Engine(model, backend, **defaults | settings), *arguments)


def logprobs(engine: Engine, jobs: list[Job]) -> list[list[tuple[int, dict[int, float]]]]:
    """For each job its tokens, and the log probabilities of the likeliest ones there."""
    return [
        [
            (token, {of: entry.logprob for of, entry in likely.items()})
            for token, likely in zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True)
        ]
        for output in engine.generate(jobs)
    ]


def assert_same(
    got: list[tuple[int, dict[int, float]]], want: list[tuple[int, dict[int, float]]], near: float, about: str
) -> None:
    """The same tokens, up to a place where two are as good as equally likely."""
    for place, ((token, likely), (wanted, of_wanted)) in enumerate(zip(got, want, strict=True)):
        if token != wanted:
            first, second = sorted(of_wanted.values())[-1:-3:-1]
            assert first - second < near, f"{about}, token {place}: {likely}, expected {of_wanted}"
            return
        assert abs(likely[token] - of_wanted[token]) < near, f"{about}, token {place}: {likely}, expected {of_wanted}"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("v2", [False, True])
def test_requests_that_do_not_skip_get_the_tokens_of_stock_attention(random_model: str, v2: bool, dtype: str) -> None:
    lengths = (20, 33, 127, 300, 700, 1500, 3000, 6000)
    # A prompt that lies in the prefix cache up to its last token is computed differently, which shows in the last bits.
    settings = {"max_model_len": 8192, "dtype": dtype, "enable_prefix_caching": False}
    stock = in_engine(
        logprobs, random_model, "FLASH_ATTN", v2, [Job(n, {}, max_tokens=48, logprobs=2) for n in lengths], **settings
    )
    jobs = [Job(n, o, max_tokens=48, logprobs=2) for o in (DENSE, skipping(-math.inf)) for n in lengths]
    lite = in_engine(logprobs, random_model, "LITE_ATTN", v2, jobs, **settings)
    assert lite[: len(lengths)] == lite[len(lengths) :]
    for length, got, want in zip(lengths, lite, stock, strict=False):
        assert_same(got, want, NEAR[dtype], f"{length} tokens")


def crowd(engine: Engine, jobs: list[Job], aborted: dict[int, int]) -> dict[str, Any]:
    """What the jobs get together, after they were served one by one, and all that was counted meanwhile."""
    alone = [engine.tokens([job])[0] for job in jobs]
    alone_blocks = blocks_read(engine)
    preempted = preempted_places(engine, first=engine.number)
    together = engine.tokens(jobs, abort=aborted)
    together_blocks = blocks_read(engine)
    engine.tokens([Job(20, DENSE, max_tokens=1)])  # the step in which the worker hears of the last ends
    return {
        "alone": alone,
        "together": together,
        "alone_blocks": alone_blocks,
        "together_blocks": together_blocks,
        "preempted": preempted,
        "active": engine.tracker.table.active_slots,
    }


def preempted_places(engine: Engine, first: int) -> set[int]:
    """Fills up with the places of the jobs that are preempted from now on, counted from the engine's job `first`."""
    tracker = engine.tracker
    places: set[int] = set()
    follow = tracker._follow_scheduler

    def follow_scheduler(scheduled: Any) -> None:
        places.update(int(name.split("-")[1]) - first for name in scheduled.preempted_req_ids or ())
        follow(scheduled)

    tracker._follow_scheduler = follow_scheduler
    return places


def blocks_read(engine: Engine) -> list[tuple[int, int]]:
    """Blocks read, and all there were, of each request that skipped since the last call."""
    of = {name.split("-")[1]: blocks for name, blocks in engine.tracker.take_stats().items()}
    return [of[number] for number in sorted(of, key=int)]


@pytest.mark.parametrize("v2", [False, True])
def test_no_request_changes_the_tokens_of_another_and_graphs_change_nothing(random_model: str, v2: bool) -> None:
    jobs, aborted = mixed_jobs(-2, -3, -4, -6, None), {3: 30, 10: 60}
    got = in_engine(crowd, random_model, "LITE_ATTN", v2, jobs, aborted, **CROWDED)
    assert got["preempted"]
    for place, (alone, together) in enumerate(zip(got["alone"], got["together"], strict=True)):
        if jobs[place].options == DENSE and place in got["preempted"]:
            continue  # stock attention computed its tokens again, which is the same within rounding
        assert together == (alone[: len(together)] if place in aborted else alone), f"request {place}: {jobs[place]}"
    assert got["active"] == 0
    assert len(got["alone_blocks"]) == sum("lite_attn_threshold" in job.options for job in jobs)
    assert sum(visited for visited, _ in got["alone_blocks"]) < 0.8 * sum(total for _, total in got["alone_blocks"])

    without = in_engine(crowd, random_model, "LITE_ATTN", v2, jobs, aborted, **CROWDED, compilation_config=NO_GRAPHS)
    assert without == got


@pytest.mark.parametrize("v2", [False, True])
def test_profiles_hold_under_graphs_and_checks_change_nothing(random_model: str, v2: bool, tmp_path: Path) -> None:
    shape = DecodeShape("LlamaForCausalLM", HEADS, KV_HEADS, HEAD_DIM)
    profiles = {
        "falling": save_profile(tmp_path / "falling.toml", [-1.0, -2.0, -4.0, -6.0], shape=shape),
        "half": save_profile(tmp_path / "half.toml", [-math.inf, -math.inf, -2.0, -2.0], shape=shape),
    }
    ways = [{"lite_attn_profile": "falling"}, {"lite_attn_profile": "half"}, skipping(-3)]
    jobs = [Job(60 + 37 * place, ways[place % 3], max_tokens=40, start=150 * place) for place in range(16)]
    lite_attn = {"profiles": profiles}
    config = {"additional_config": {"lite_attn": lite_attn}}
    got = in_engine(crowd, random_model, "LITE_ATTN", v2, jobs, {}, **CROWDED, **config)
    assert got["preempted"]
    assert got["together"] == got["alone"]
    halves = [1 - visited / total for (visited, total), job in zip(got["alone_blocks"], jobs, strict=True)
              if job.options == ways[1]]  # fmt: skip
    assert 0.1 < sum(halves) / len(halves) < 0.5

    config = {"additional_config": {"lite_attn": lite_attn | {"check_share": 0.5}}, "compilation_config": NO_GRAPHS}
    assert in_engine(crowd, random_model, "LITE_ATTN", v2, jobs, {}, **CROWDED, **config) == got


def calibrated(engine: Engine) -> tuple[float, float]:
    """The share of mass dropped that calibration reaches, and that its result drops in the same texts again."""
    from lite_attention.backend.vllm import calibration

    prompts = [engine.prompt(Job(600, {}, start=start))["prompt_token_ids"] for start in (0, 1000)]
    texts = calibration.answer(engine.llm, prompts, max_tokens=32)
    found = calibration.calibrate(engine.llm, texts, "dropped=0.1", model="random", inputs="two")
    again = calibration.measure(engine.llm, texts, found)
    return found.mean().dropped, sum(cost.dropped for cost in again.values()) / LAYERS


@pytest.mark.parametrize("v2", [False, True])
def test_a_calibration_reaches_its_target(random_model: str, v2: bool) -> None:
    from lite_attention.backend.vllm import calibration

    settings = calibration.ENGINE_ARGS | {"compilation_config": NO_GRAPHS}
    reached, again = in_engine(calibrated, random_model, "LITE_ATTN", v2, **settings)
    assert reached == pytest.approx(0.1, rel=0.1)
    assert again == pytest.approx(reached, rel=0.02)


def follow_up(engine: Engine) -> list[tuple[int, list[int]]]:
    """Cached tokens and answer of a request whose prompt holds a reckless one's answer, with a cache and without."""
    prompt = engine.prompt(Job(320, {}))["prompt_token_ids"]
    answer = engine.tokens([Job(320, skipping(-1), max_tokens=100)])[0]
    question: Any = {"prompt_token_ids": prompt + answer + prompt[:40]}
    answers = []
    for _ in range(2):
        output = engine.llm.generate([question], engine.params(Job(0, DENSE, max_tokens=8)), use_tqdm=False)[0]
        answers.append((output.num_cached_tokens, list(output.outputs[0].token_ids)))
        engine.llm.reset_prefix_cache()
    return answers


def test_keys_computed_under_skipping_are_not_shared_as_a_prefix(random_model: str) -> None:
    (cached, answer), (fresh, again) = in_engine(follow_up, random_model, "LITE_ATTN", True)
    assert (cached, fresh) == (320, 0)
    assert answer == again


def before_and_after_sleep(engine: Engine) -> list[list[list[int]]]:
    jobs = [Job(600, skipping(-5)), Job(200, DENSE)]
    answers = [engine.tokens(jobs)]
    engine.llm.sleep(level=1)
    engine.llm.wake_up()
    return [*answers, engine.tokens(jobs)]


def test_an_engine_that_slept_answers_as_before(random_model: str) -> None:
    before, after = in_engine(before_and_after_sleep, random_model, "LITE_ATTN", True, enable_sleep_mode=True)
    assert before == after


def sparsity(engine: Engine, thresholds: list[float]) -> list[float]:
    return [output.lite_attn["sparsity"] for output in engine.generate([Job(1200, skipping(t)) for t in thresholds])]


@pytest.mark.parametrize("v2", [False, True])
def test_lower_thresholds_skip_less_without_compilation_too(random_model: str, v2: bool) -> None:
    shares = in_engine(sparsity, random_model, "LITE_ATTN", v2, [-2, -4, -6, -20], enforce_eager=True)
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.5 > shares[-1]


def logprobs_and_crowd(engine: Engine, dense: list[Job], jobs: list[Job]) -> tuple[Any, list[tuple[Any, Any, float]]]:
    """`logprobs`; and of each of `jobs` its tokens alone and beside all others, and the share that was skipped then."""
    alone = [output.outputs[0].token_ids for job in jobs for output in engine.generate([job])]
    crowd = [
        (list(tokens), list(output.outputs[0].token_ids), output.lite_attn["sparsity"])
        for tokens, output in zip(alone, engine.generate(jobs), strict=True)
    ]
    return logprobs(engine, dense), crowd


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("v2", [False, True])
def test_two_ranks_with_half_of_the_heads_each(random_model: str, v2: bool) -> None:
    two: dict[str, Any] = {"tensor_parallel_size": 2, "enable_prefix_caching": False}
    lengths = (20, 300, 1500)
    jobs = [Job(n, skipping(-math.inf), max_tokens=48, logprobs=2) for n in lengths]
    mixed = [Job(200 + 150 * place, skipping(-2 - place), start=1000 * place) for place in range(6)]
    lite, crowd = in_engine(logprobs_and_crowd, random_model, "LITE_ATTN", v2, jobs, mixed, **two)
    for place, (alone, together, skipped) in enumerate(crowd):
        assert together == alone, f"request {place}"
        assert 0 < skipped < 1

    dense = [Job(n, {}, max_tokens=48, logprobs=2) for n in lengths]
    stock = in_engine(logprobs, random_model, "FLASH_ATTN", v2, dense, **two)
    one = in_engine(logprobs, random_model, "LITE_ATTN", v2, jobs, enable_prefix_caching=False)
    for length, got, want, of_one in zip(lengths, lite, stock, one, strict=True):
        assert_same(got, want, NEAR["float16"], f"{length} tokens, stock attention")
        assert_same(got, of_one, NEAR["float16"], f"{length} tokens, one rank")
