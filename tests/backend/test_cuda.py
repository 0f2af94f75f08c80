"""The CUDA backend's choices, without a GPU: its builder and a layer run with the reference operator, and with a plain
dense attention in the place of FlashAttention, through whatever a scheduler may do."""

from __future__ import annotations

import importlib.util
import math
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lite_attention import reference
from lite_attention.backend.vllm import steps
from lite_attention.backend.vllm.launches import Launches
from lite_attention.backend.vllm.state import LayerState
from lite_attention.backend.vllm.steps import StepTracker
from lite_attention.serving.metrics import StepCounters, bucket_index
from lite_attention.serving.params import ServerOptions
from lite_attention.tiles import DECODE_BLOCK, ceil_div
from tests.profiles import make_profile

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
]

HEADS, KV_HEADS, HEAD_DIM, PAGE, ROOM = 4, 2, 16, 16, 128
SEQUENCES, PADDED = 4, 6
PAGES_A_SEQUENCE = ROOM // PAGE
CHUNK = 24
LAYERS = ("first", "second")
PROFILES: dict[str, tuple[float, float]] = {"wild": (-1.0, -4.0), "half": (-math.inf, -2.0)}

Way = float | str
"""How a request skips: a threshold, or a profile's name."""


@dataclass
class Request:
    """Keys, values and queries (tokens, heads, head_dim) of a sequence are known from the start."""

    name: str
    prompt: int
    tokens: int
    way: Way
    computed: int = 0
    row: int | None = None  # of the memory that holds its pages
    preempted: bool = False
    outputs: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        self.query = 3 * torch.randn(self.tokens, HEADS, HEAD_DIM, generator=random)
        self.key_value = torch.randn(self.tokens, KV_HEADS, 2 * HEAD_DIM, generator=random)


class Layer:
    """One attention layer and its cache."""

    def __init__(self, number: int, shared: Launches) -> None:
        from lite_attention.backend.vllm import cuda

        self.cache = torch.zeros(1 + SEQUENCES * PAGES_A_SEQUENCE, PAGE, KV_HEADS, 2 * HEAD_DIM).transpose(1, 2)
        self.impl: Any = cuda.LiteAttentionImpl.__new__(cuda.LiteAttentionImpl)
        self.impl.num_heads, self.impl.head_size, self.impl.scale = HEADS, HEAD_DIM, HEAD_DIM**-0.5
        self.impl.state = LayerState(SEQUENCES + 1, KV_HEADS, ROOM)
        self.impl.state.number = number
        self.impl.launches, self.impl.rows_a_launch = shared, 3
        self.impl.allocate_summaries(self.cache)


class Engine:
    """A worker with two attention layers, and the little of a scheduler that it sees."""

    def __init__(self, v2: bool, counters: StepCounters | None = None, **server: Any) -> None:
        from lite_attention.backend.vllm import cuda

        self.v2 = v2
        profiles = {name: make_profile(dict(zip(LAYERS, by, strict=True))) for name, by in PROFILES.items()}
        options = ServerOptions(profiles=profiles, **server)
        self.tracker = StepTracker(options, SEQUENCES + 1, counters, dense_rows=True, layers=LAYERS)
        shared = Launches({}, PADDED, torch.device("cpu"))
        shared.lse = torch.empty(PADDED * HEADS)
        self.layers = [Layer(number, shared) for number in range(len(LAYERS))]
        self.builder: Any = cuda.LiteMetadataBuilder.__new__(cuda.LiteMetadataBuilder)
        self.builder.reason, self.builder.kv_heads = None, KV_HEADS * len(LAYERS)
        self.builder.fields = shared.fields(len(LAYERS))
        self.builder.block_size, self.builder.device = PAGE, torch.device("cpu")
        self.builder.model_config = SimpleNamespace(max_model_len=ROOM)
        self.known: set[str] = set()
        self.free = list(range(SEQUENCES))

    def drop(self, request: Request) -> None:
        if request.row is not None:
            self.free.append(request.row)
            request.row = None

    def step(self, batch: dict[str, int], requests: dict[str, Request], ended: set[str], preempted: set[str]) -> None:
        """Compute so many tokens of each request; `ended` and `preempted` lose their memory before."""
        for name in ended | preempted:
            self.drop(requests[name])
        for name in preempted:
            requests[name].computed, requests[name].preempted = 0, True
        for name in batch:
            if requests[name].row is None:
                requests[name].row = self.free.pop()
        started = [name for name in batch if name not in self.known or (self.v2 and requests[name].preempted)]
        cached = [name for name in batch if name not in started]
        scheduled = SimpleNamespace(
            finished_req_ids=ended,
            preempted_req_ids=preempted,
            scheduled_new_reqs=[self.new(requests[name]) for name in started],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=cached,
                num_computed_tokens=[requests[name].computed for name in cached],
                resumed_req_ids={name for name in cached if requests[name].preempted},
            ),
        )
        self.known = (self.known | set(batch)) - ended
        for name in batch:
            requests[name].preempted = False
        with self.tracker.step(scheduled, lambda: list(batch)):
            self.run([(requests[name], count) for name, count in batch.items()])

    def new(self, request: Request) -> SimpleNamespace:
        name = "lite_attn_profile" if isinstance(request.way, str) else "lite_attn_threshold"
        params = SimpleNamespace(extra_args={name: request.way})
        return SimpleNamespace(
            req_id=request.name,
            sampling_params=params,
            prompt_token_ids=[0] * request.prompt,
            num_computed_tokens=request.computed,
        )

    def run(self, batch: list[tuple[Request, int]]) -> None:
        from vllm.v1.attention.backend import CommonAttentionMetadata

        single = all(count == 1 for _, count in batch)
        padding = PADDED - len(batch) if single else 0
        counts = [count for _, count in batch]
        ends = [request.computed + count for request, count in batch]
        first_pages = {request.name: 1 + (request.row or 0) * PAGES_A_SEQUENCE for request, _ in batch}
        tables = [[first_pages[request.name] + n for n in range(PAGES_A_SEQUENCE)] for request, _ in batch]
        query_start = torch.tensor([0, *counts, *[0] * padding]).cumsum(0).int()
        tokens = [(request, request.computed + n) for request, count in batch for n in range(count)]
        slots = [first_pages[request.name] * PAGE + position for request, position in tokens]
        common = CommonAttentionMetadata(
            query_start_loc=query_start,
            query_start_loc_cpu=query_start,
            seq_lens=torch.tensor([*ends, *[0] * padding], dtype=torch.int32),
            num_reqs=len(batch) + padding,
            num_actual_tokens=len(tokens) + padding,
            max_query_len=max(counts),
            max_seq_len=max(ends),
            block_table_tensor=torch.tensor([*tables, *[[0] * PAGES_A_SEQUENCE] * padding], dtype=torch.int32),
            slot_mapping=torch.tensor([*slots, *[-1] * padding]),
        )
        metadata = self.builder.build(0, common)
        pad = [torch.zeros(HEADS, HEAD_DIM)] * padding
        query = torch.stack([request.query[position] for request, position in tokens] + pad)
        added = torch.stack([request.key_value[position] for request, position in tokens])
        outputs = []
        for layer in self.layers:
            layer.impl.do_kv_cache_update(None, added, added, layer.cache, common.slot_mapping)
            output = torch.full_like(query, math.nan)
            layer.impl.forward(None, query, None, None, layer.cache, metadata, output)
            outputs.append(output)
        for (request, position), out in zip(tokens, torch.stack(outputs, 1), strict=False):
            known = request.outputs.setdefault(position, out)
            assert torch.allclose(known, out, atol=1e-5), "computed again, another result"
        for request, count in batch:
            request.computed += count


def stock_build(self: Any, common_prefix_len: int, common: Any, fast_build: bool = False) -> Any:
    return SimpleNamespace(common=common)


def stock_forward(
    self: Any, layer: Any, query: Tensor, key: Any, value: Any, cache: Tensor, metadata: Any, output: Tensor
) -> Tensor:
    common = metadata.common
    keys, values = cache.transpose(1, 2).split(HEAD_DIM, -1)
    for row in range(common.num_reqs):
        begin, end = common.query_start_loc[row : row + 2].tolist()
        length = int(common.seq_lens[row])
        pages = common.block_table_tensor[row].long()
        k, v = (x[pages].flatten(0, 1)[:length].repeat_interleave(HEADS // KV_HEADS, 1) for x in (keys, values))
        for token in range(begin, end):
            context = length - (end - 1 - token)
            scores = torch.einsum("hd,khd->hk", query[token], k[:context]) * self.scale
            output[token] = torch.einsum("hk,khd->hd", scores.softmax(-1), v[:context])
    return output


def stock_update(self: Any, layer: Any, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
    for added, slot in zip(key, slots.tolist(), strict=False):
        cache[slot // PAGE, :, slot % PAGE] = added


def decode_into(out: Tensor, lse: Tensor, visited: Tensor, *arguments: Any) -> None:
    *inputs, _workspace = arguments
    computed, computed_lse, blocks = reference.decode(*inputs)
    out.copy_(computed)
    lse.copy_(computed_lse)
    visited += blocks


@pytest.fixture(autouse=True, scope="module")
def stand_ins() -> Iterator[None]:
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl, FlashAttentionMetadataBuilder

    from lite_attention.backend.vllm import cuda

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FlashAttentionMetadataBuilder, "build", stock_build)
        patch.setattr(FlashAttentionImpl, "forward", stock_forward)
        patch.setattr(FlashAttentionImpl, "do_kv_cache_update", stock_update)
        patch.setattr(cuda, "decode_into", decode_into)
        yield


def alone(request: Request) -> dict[int, Tensor]:
    """Outputs of a request that is served alone, its prompt in one piece and then a token a step."""
    copy = Request(request.name, request.prompt, request.tokens, request.way)
    engine = Engine(v2=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "_tracker", engine.tracker)
        while copy.computed < copy.tokens:
            engine.step({copy.name: max(1, copy.prompt - copy.computed)}, {copy.name: copy}, set(), set())
    return copy.outputs


WAYS: list[Way] = [-math.inf, -1.0, -3.0, -5.0, *PROFILES]
SHAPES = st.tuples(st.integers(1, 90), st.integers(1, 20), st.sampled_from(WAYS))
"""Of requests: tokens of the prompt, tokens behind it, how it skips."""


@settings(max_examples=25, deadline=None)
@given(data=st.data(), v2=st.booleans(), check_share=st.sampled_from([0, 0.4, 1]))
def test_whatever_is_served_beside_it_a_request_gets_what_it_gets_alone(
    data: st.DataObject, v2: bool, check_share: float
) -> None:
    shapes = data.draw(st.lists(SHAPES, min_size=1, max_size=5))
    requests = {f"r{n}": Request(f"r{n}", prompt, prompt + more, at) for n, (prompt, more, at) in enumerate(shapes)}
    engine, blocks = Engine(v2, check_share=check_share), 0
    ended: set[str] = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "_tracker", engine.tracker)
        for _ in range(60):
            live = [name for name, request in requests.items() if name not in ended]
            if not live:
                break
            done = {name for name in live if requests[name].computed == requests[name].tokens}
            running = [name for name in live if requests[name].computed and name not in done]
            preempted = set(data.draw(st.lists(st.sampled_from(running), max_size=1))) if running else set()
            able = [name for name in live if name not in done | preempted]
            room = SEQUENCES - sum(requests[name].row is not None for name in able)
            chosen = [n for n in able if requests[n].row is not None or (room := room - 1) >= 0]
            order = data.draw(st.permutations(chosen))
            batch = {}
            for name in order:
                request = requests[name]
                left = max(request.prompt, len(request.outputs)) - request.computed  # known tokens
                batch[name] = 1 if left <= 0 else min(left, data.draw(st.integers(1, CHUNK)))
                first = max(request.computed, request.prompt)
                for position in range(first, request.computed + batch[name]):
                    of_layer = KV_HEADS * ceil_div(position + 1, DECODE_BLOCK)
                    blocks += len(LAYERS) * of_layer * (request.way != -math.inf)
            if batch:
                engine.step(batch, requests, done, preempted)
            ended |= done
    for request in requests.values():
        expected = alone(request)
        for position, out in request.outputs.items():
            assert torch.allclose(out, expected[position], atol=1e-5), (request.name, position)
    stats = engine.tracker.take_stats()
    assert sum(total for _, total in stats.values()) == blocks
    assert all(visited <= total for visited, total in stats.values())


def test_a_builder_that_is_asked_about_pieces_of_requests_makes_no_plan() -> None:
    """Chunked attention derives a builder and hands it a batch of its own making, before ours is asked or after."""
    from lite_attention.backend.vllm import cuda

    class Pieces(cuda.LiteMetadataBuilder):
        pass

    engine = Engine(v2=False)
    ours = engine.builder
    pieces: Any = Pieces.__new__(Pieces)
    pieces.__dict__.update(vars(ours), reason="attn_type")

    def build(common_prefix_len: int, common: Any) -> Any:
        count = common.num_actual_tokens
        each = torch.arange(count + 1, dtype=torch.int32)
        split = common.replace(query_start_loc=each, query_start_loc_cpu=each, num_reqs=count, max_query_len=1)
        assert pieces.build(common_prefix_len, split).lite is None
        return ours.build(common_prefix_len, common)

    engine.builder = SimpleNamespace(build=build)
    first, second = Request("first", 40, 52, -3.0), Request("second", 30, 40, -3.0)
    requests = {"first": first, "second": second}
    batches = [{"first": 40}, {"second": 17, "first": 1}, {"second": 13, "first": 1}, {"first": 1, "second": 1}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "_tracker", engine.tracker)
        for batch in batches:
            engine.step(batch, requests, set(), set())
    for request in requests.values():
        expected = alone(request)
        for position, out in request.outputs.items():
            assert torch.allclose(out, expected[position], atol=1e-5), (request.name, position)
    assert {name for name, _ in engine.tracker.take_stats().items()} == set(requests)


@pytest.mark.parametrize("together", [False, True])
def test_checked_tokens_say_what_skipping_cost_them(together: bool, tmp_path: Path) -> None:
    """Alone a request's tokens are launched as a batch of single tokens, beside a prompt as a wave."""
    counters = StepCounters.create(tmp_path / "worker", slots=SEQUENCES)
    engine = Engine(v2=True, counters=counters, check_share=1)
    skipping, prompt = Request("a", 80, 92, "half"), Request("b", 60, 60, -1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "_tracker", engine.tracker)
        while skipping.computed < skipping.tokens:
            batch = {"a": max(1, skipping.prompt - skipping.computed)}
            more = {"b": 5} if together and skipping.computed >= skipping.prompt else {}
            engine.step(batch | more, {"a": skipping, "b": prompt}, set(), set())
    errors = []
    for position in range(skipping.prompt, skipping.tokens):
        exact = attention(skipping, position)
        of_layers = [(out - exact).norm() / exact.norm() for out in skipping.outputs[position]]
        assert of_layers[0] < 1e-5  # the profile leaves that layer dense
        errors.append(float(sum(of_layers) / len(of_layers)))
    read, at = counters.read(), bucket_index(-2.0)
    assert max(errors) > 0.05
    assert read.checked.sum() == read.checked[at].sum() == len(errors)
    assert math.isclose(read.errors[at], sum(errors), rel_tol=1e-3)


def attention(request: Request, position: int) -> Tensor:
    """Dense attention of a token, (heads, head_dim)."""
    keys, values = request.key_value[: position + 1].split(HEAD_DIM, -1)
    k, v = (tensor.repeat_interleave(HEADS // KV_HEADS, 1) for tensor in (keys, values))
    scores = torch.einsum("hd,khd->hk", request.query[position], k) * HEAD_DIM**-0.5
    return torch.einsum("hk,khd->hd", scores.softmax(-1), v)


def test_a_run_that_serves_no_request_is_dense_and_keeps_the_state() -> None:
    engine = Engine(v2=True)
    state = engine.layers[1].impl.state
    state.mask.fill_(7)
    request = Request("a", 1, 3, -1.0, row=0)
    engine.run([(request, 1)])  # outside of a step
    fields = engine.builder.fields
    assert fields.slots.tolist() == [0] * PADDED
    assert fields.thresholds.tolist() == [[-math.inf] * PADDED] * len(LAYERS)
    assert state.mask.unique().tolist() == [7]
    assert engine.tracker.take_stats() == {}


def test_requests_that_warm_an_engine_up_are_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    from lite_attention.backend.vllm import hooks

    followed = []

    def step(*_: Any) -> Any:
        followed.append(True)
        return nullcontext()

    tracker = SimpleNamespace(step=step, count_memory=lambda state_bytes: None)
    monkeypatch.setattr(hooks, "_tracker_of", lambda runner: tracker)
    runner = SimpleNamespace()

    def execute() -> str:
        return hooks._execute_model(lambda runner, scheduled: "ran", runner, SimpleNamespace())

    worker = SimpleNamespace(model_runner=runner)
    assert hooks._warm_up(lambda worker: execute(), worker) == "ran"
    assert not followed
    assert execute() == "ran"
    assert followed
