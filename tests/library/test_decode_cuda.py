"""`lite_attention::decode` and `summarize` on Hopper GPUs against the reference, and what only a GPU can get wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor

from lite_attention import decode_cuda, ops, reference
from lite_attention.ranges import unpack_bits
from lite_attention.tiles import DECODE_BLOCK, ceil_div, mask_words

DEVICE = torch.device("cuda", 0)
SEGMENT = 2048
"""Keys of a part of a row that visits everything."""
MARGIN = 0.02
"""Log2 units from the threshold within which a decision may fall either way."""
OUT_TOLERANCE = {torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def why_not() -> str | None:
    """Why these tests cannot run here; None where they can."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return "needs a Hopper GPU"
    try:
        decode_cuda.check_supported(torch.bfloat16, 64, 1, DEVICE)
    except RuntimeError as error:
        return str(error)
    return None


REASON = why_not()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(REASON is not None, reason=REASON or ""),
    pytest.mark.usefixtures("one_thread"),
]


@dataclass(frozen=True)
class Shape:
    lengths: tuple[int, ...]
    kv_heads: int = 2
    group: int = 4
    head_dim: int = 128
    page: int = 16
    layout: str = "NHD"
    dtype: torch.dtype = torch.bfloat16


@dataclass
class Inputs:
    """A step's arguments, in the operator's order, the scale left out."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    summaries: Tensor
    block_table: Tensor
    seq_lens: Tensor
    slots: Tensor
    thresholds: Tensor
    visit_all: Tensor
    mask: Tensor

    @property
    def scale(self) -> float:
        return float(self.query.shape[2] ** -0.5)

    def tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]

    def to(self, device: torch.device | str) -> Inputs:
        """A copy; strides of the cache are kept."""
        return Inputs(*(_copy(tensor, device) for tensor in self.tensors()))

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.lite_attention.decode(*self.tensors(), self.scale)  # type: ignore[no-any-return]


def _copy(tensor: Tensor, device: torch.device | str) -> Tensor:
    storage = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
    return storage.to(device, copy=True).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def paged(shape: Shape, pages: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a cache as vLLM lays it out: both of a token side by side."""
    if shape.layout == "NHD":
        cache = torch.zeros(pages, shape.page, shape.kv_heads, 2 * shape.head_dim, dtype=shape.dtype)
    else:
        cache = torch.zeros(pages, shape.kv_heads, shape.page, 2 * shape.head_dim, dtype=shape.dtype).transpose(1, 2)
    key, value = cache.split(shape.head_dim, -1)
    return key, value


def make_inputs(shape: Shape, threshold: float = -5.0, seed: int = 0) -> Inputs:
    """A first step. Pages lie in random order, page 0 is nobody's; keys drift, so that blocks differ in weight."""
    torch.manual_seed(seed)
    rows = len(shape.lengths)
    row_pages = max(1, ceil_div(max(shape.lengths, default=1), shape.page))
    pages = 1 + sum(ceil_div(length, shape.page) for length in shape.lengths)
    key, value = paged(shape, pages)
    drift = torch.randn(pages, 1, shape.kv_heads, shape.head_dim)
    key.copy_((torch.randn(key.shape) + 1.5 * drift).to(shape.dtype))
    value.copy_(torch.randn(value.shape).to(shape.dtype))
    summaries = torch.zeros(ops.summaries_shape(key), dtype=torch.uint8)
    kernels_slots = torch.arange(DECODE_BLOCK - 1, pages * shape.page, DECODE_BLOCK)
    torch.ops.lite_attention.summarize(key, kernels_slots, summaries)
    table = torch.zeros(rows, row_pages, dtype=torch.int32)
    free = iter((torch.randperm(pages - 1) + 1).tolist())
    for row, length in enumerate(shape.lengths):
        for page in range(ceil_div(length, shape.page)):
            table[row, page] = next(free)
    words = mask_words(row_pages * shape.page // DECODE_BLOCK)
    return Inputs(
        next_query(shape, seed),
        key,
        value,
        summaries,
        table,
        torch.tensor(shape.lengths, dtype=torch.int32),
        torch.arange(rows, dtype=torch.int32) + 1,
        torch.full((rows,), threshold),
        torch.ones(rows, dtype=torch.bool),
        torch.full((rows + 1, shape.kv_heads, words), -1, dtype=torch.int32),
    )


def next_query(shape: Shape, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + seed)
    size = (len(shape.lengths), shape.kv_heads * shape.group, shape.head_dim)
    return torch.randn(size, generator=generator).to(shape.dtype)


def assert_step_agrees(inputs: Inputs, tolerance: float) -> int:
    """Run a step on both sides from the same state, compare, and leave the reference's state. Blocks in doubt."""
    before = inputs.to("cpu")
    device = inputs.to(DEVICE)
    out, lse, visited = (t.cpu() for t in device.run())
    want, want_lse, want_visited = reference.decode(*inputs.tensors(), inputs.scale)
    in_doubt = 0
    kv_heads = inputs.key_cache.shape[2]
    group = inputs.query.shape[1] // kv_heads
    for row, length in enumerate(inputs.seq_lens.tolist()):
        doubts = 0
        slot, threshold = int(inputs.slots[row]), float(inputs.thresholds[row])
        blocks = ceil_div(length, DECODE_BLOCK)
        for head in range(kv_heads if length else 0):
            doubtful = torch.zeros(blocks, dtype=torch.bool)
            if threshold > -math.inf:
                heads = slice(head * group, (head + 1) * group)
                query = inputs.query[row, heads].float() * (inputs.scale * reference.LOG2_E)
                pages = inputs.block_table[row, : ceil_div(length, inputs.key_cache.shape[1])].long()
                summaries = inputs.summaries[pages].transpose(1, 2).flatten(0, 1)[:blocks, head]
                keys = inputs.key_cache[pages, :, head].flatten(0, 1)[:length].float()
                scores = torch.nn.functional.pad(query @ keys.T, (0, -length % DECODE_BLOCK), value=-math.inf)
                mass = torch.logsumexp(scores.unflatten(1, (-1, DECODE_BLOCK)) * math.log(2), -1) * reference.LOG2_E
                shares = mass - want_lse[row, heads, None] * reference.LOG2_E
                doubtful |= ((shares - threshold).abs() < MARGIN).any(0)
                if not before.visit_all[row]:
                    nothing = torch.zeros(blocks, dtype=torch.bool)
                    read = torch.cat((mass[:, :1], mass[:, max(blocks - 2, 1) :]), 1)
                    of_read = torch.logsumexp(read * math.log(2), 1) * reference.LOG2_E
                    low, high = (
                        reference.blocks_to_visit(query, summaries, nothing, of_read, threshold + margin)
                        for margin in (MARGIN, -MARGIN)
                    )
                    unsure = (low != high) & ~unpack_bits(before.mask[slot, head], blocks)
                    doubtful |= unsure
                    doubts += int(unsure.sum())
            got_bits = unpack_bits(device.mask[slot, head].cpu(), blocks)
            want_bits = unpack_bits(inputs.mask[slot, head], blocks)
            assert not ((got_bits != want_bits) & ~doubtful).any(), f"row {row}, head {head}"
            in_doubt += int(doubtful.sum())
        assert abs(int(visited[row]) - int(want_visited[row])) <= doubts, f"row {row}"
        slack = doubts * 2.0**threshold if doubts else 0.0
        torch.testing.assert_close(out[row], want[row], rtol=0, atol=tolerance + 8 * slack)
        torch.testing.assert_close(lse[row], want_lse[row], rtol=0, atol=2e-3 + 2 * slack)
    return in_doubt


SHAPES = {
    "one block": Shape((7,)),
    "ragged rows": Shape((1, 16, 17, 33, 250, 1023)),
    "one off a block": Shape((31, 32, 33, 47, 48, 49)),
    "length 0 is padding": Shape((100, 0, 0)),
    "one off a segment": Shape((SEGMENT - 1, SEGMENT, SEGMENT + 1)),
    "many segments": Shape((3 * SEGMENT + 17, 5), kv_heads=1),
    "lists of several chunks": Shape((36000,), kv_heads=1, group=2, head_dim=64),
    "channels shared unevenly": Shape((34000,), kv_heads=1, group=3, head_dim=80),
    "three key heads": Shape((300, 2500), kv_heads=3, group=1, head_dim=64),
    "six key heads": Shape((300, 2500), kv_heads=6, group=1, head_dim=64),
    "eight key heads": Shape((700, 2500), kv_heads=8, group=2),
    "more key heads than lanes": Shape((40, 600), kv_heads=40, group=1, head_dim=64),
    "one head a group": Shape((300, 5000), group=1),
    "three heads a group": Shape((600,), group=3, head_dim=64),
    "seven heads a group": Shape((600,), group=7),
    "eight heads a group": Shape((600, 4200), group=8),
    "nine heads a group": Shape((600, 4200), kv_heads=1, group=9),
    "sixteen heads a group": Shape((700, 4200), kv_heads=1, group=16),
    "head size 64": Shape((500, 5000), head_dim=64),
    "head size 80": Shape((500, 4500), head_dim=80),
    "head size 96": Shape((500,), head_dim=96),
    "head size 192": Shape((500, 4500), head_dim=192),
    "head size 256": Shape((500, 4500), head_dim=256),
    "head size 256, sixteen heads a group": Shape((500, 4500), kv_heads=1, group=16, head_dim=256),
    "head size 32": Shape((300,), head_dim=32),
    "pages of 32": Shape((300, 129), page=32),
    "pages of 48": Shape((300, 129), page=48),
    "pages of 256": Shape((300, 1290), page=256),
    "heads before tokens": Shape((300, 5000), page=32, layout="HND"),
    "float16": Shape((200, 77, 4100), dtype=torch.float16),
    "float16, head size 64": Shape((200, 77), head_dim=64, dtype=torch.float16),
    "more work than processors": Shape((9000,) * 12, kv_heads=4, group=2, head_dim=64),
    "many rows": Shape(tuple(range(1, 200, 3)), kv_heads=1, head_dim=64),
    "lists found by two warps": Shape(tuple(range(30, 1430, 20)), kv_heads=2, group=1, head_dim=64),
    "lists found by one warp": Shape(tuple(range(30, 730, 5)), kv_heads=2, group=1, head_dim=64),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_decode_equals_the_reference_over_steps(shape: Shape) -> None:
    inputs = make_inputs(shape)
    for number in range(3):
        inputs.query = next_query(shape, number)
        inputs.visit_all.fill_(number == 0)
        assert_step_agrees(inputs, OUT_TOLERANCE[shape.dtype])


@pytest.mark.parametrize("threshold", [-2.0, -8.0, -14.0, -60.0])
def test_decode_equals_the_reference_at_other_thresholds(threshold: float) -> None:
    shape = Shape((2000, 4700), kv_heads=1)
    inputs = make_inputs(shape, threshold)
    for number in range(3):
        inputs.query = next_query(shape, number)
        inputs.visit_all.fill_(number == 0)
        assert_step_agrees(inputs, OUT_TOLERANCE[shape.dtype])


def test_rows_of_one_batch_may_differ_in_everything() -> None:
    shape = Shape((900, 4500, 0, 900, 77))
    inputs = make_inputs(shape)
    assert_step_agrees(inputs, OUT_TOLERANCE[shape.dtype])
    inputs.thresholds = torch.tensor([-math.inf, -4.0, -5.0, -7.0, -3.0])
    inputs.visit_all = torch.tensor([False, False, False, True, False])
    inputs.query = next_query(shape, 1)
    assert_step_agrees(inputs, OUT_TOLERANCE[shape.dtype])


def test_rows_at_minus_infinity_are_dense_and_leave_the_state_alone() -> None:
    shape = Shape((300, 5000))
    inputs = make_inputs(shape, -math.inf)
    device = inputs.to(DEVICE)
    _, _, visited = device.run()
    assert torch.equal(device.mask.cpu(), inputs.mask)
    assert visited.tolist() == [shape.kv_heads * ceil_div(length, DECODE_BLOCK) for length in shape.lengths]
    assert_step_agrees(inputs, OUT_TOLERANCE[shape.dtype])


def test_long_dense_rows_equal_attention_by_pytorch() -> None:
    shape = Shape((270001, 70001), kv_heads=8)
    inputs = make_inputs(replace(shape, lengths=(16,)), -math.inf)
    pages = ceil_div(shape.lengths[0], 16)
    key, value = (tensor.to(DEVICE) for tensor in paged(shape, pages))
    key.normal_()
    value.normal_()
    inputs = replace(
        inputs.to(DEVICE),
        query=next_query(shape, 0).to(DEVICE),
        key_cache=key,
        value_cache=value,
        summaries=torch.zeros(ops.summaries_shape(key), dtype=torch.uint8, device=DEVICE),
        block_table=torch.randperm(pages, device=DEVICE).int().expand(2, -1),
        seq_lens=torch.tensor(shape.lengths, dtype=torch.int32, device=DEVICE),
        slots=torch.zeros(2, dtype=torch.int32, device=DEVICE),
        thresholds=torch.full((2,), -math.inf, device=DEVICE),
        visit_all=torch.zeros(2, dtype=torch.bool, device=DEVICE),
        mask=torch.zeros(1, 8, mask_words(pages), dtype=torch.int32, device=DEVICE),
    )
    for _ in range(3):
        out, _, visited = inputs.run()
        for row, length in enumerate(shape.lengths):
            assert int(visited[row]) == 8 * ceil_div(length, DECODE_BLOCK)
            tokens = [
                cache[inputs.block_table[row].long()].flatten(0, 1)[:length].transpose(0, 1).float()
                for cache in (key, value)
            ]
            by_head = inputs.query[row].view(8, 4, 128).float()
            want = torch.nn.functional.scaled_dot_product_attention(by_head, *tokens)
            torch.testing.assert_close(out[row].view(8, 4, 128).float(), want, rtol=1e-2, atol=1e-4)


def test_blocks_are_skipped() -> None:
    shape = Shape((4000,), kv_heads=1, group=1)
    device = make_inputs(shape).to(DEVICE)
    _, _, everything = device.run()
    device.visit_all.fill_(False)
    _, _, visited = device.run()
    assert int(everything) == ceil_div(4000, DECODE_BLOCK)
    assert 3 <= int(visited) < int(everything) / 2


def assert_each_row_alone_is_equal(together: Inputs, shape: Shape) -> None:
    """Three steps of a batch, bit for bit."""
    alone = together.to(DEVICE)
    for number in range(3):
        together.query = next_query(shape, number).to(DEVICE)
        together.visit_all.fill_(number == 0)
        out, lse, visited = together.run()
        for row in range(len(shape.lengths)):
            of_row = {
                name: getattr(together, name)[row : row + 1]
                for name in ("query", "block_table", "seq_lens", "slots", "thresholds", "visit_all")
            }
            mine = replace(alone, **of_row).run()
            for got, want in zip(mine, (out, lse, visited), strict=True):
                assert torch.equal(got[0], want[row])
    assert torch.equal(alone.mask, together.mask)


def test_a_row_does_not_depend_on_its_batch() -> None:
    shape = Shape((700, 33, 9000, 5, 4096))
    together = make_inputs(shape).to(DEVICE)
    together.thresholds = torch.tensor([-4.0, -6.0, -8.0, -2.0, -math.inf], device=DEVICE)
    assert_each_row_alone_is_equal(together, shape)


def test_a_row_does_not_depend_on_a_batch_of_many_units() -> None:
    # The rows share their pages, in another order each.
    shape = Shape(tuple(range(8000, 0, -125)), kv_heads=8)
    rows = len(shape.lengths)
    inputs = make_inputs(replace(shape, lengths=shape.lengths[:1])).to(DEVICE)
    pages = inputs.block_table[0]
    together = replace(
        inputs,
        query=next_query(shape, 0).to(DEVICE),
        block_table=torch.stack([pages[torch.randperm(len(pages))] for _ in range(rows)]),
        seq_lens=torch.tensor(shape.lengths, dtype=torch.int32, device=DEVICE),
        slots=torch.arange(rows, dtype=torch.int32, device=DEVICE),
        thresholds=torch.full((rows,), -5.0, device=DEVICE),
        visit_all=torch.ones(rows, dtype=torch.bool, device=DEVICE),
        mask=inputs.mask[:1].repeat(rows, 1, 1),
    )
    together.thresholds[::7] = -math.inf
    assert_each_row_alone_is_equal(together, shape)


def test_runs_repeat_bit_for_bit() -> None:
    shape = Shape((700, 20000, 9000), kv_heads=4)
    inputs = make_inputs(shape).to(DEVICE)
    inputs.run()
    inputs.visit_all.fill_(False)
    first = inputs.to(DEVICE)
    wanted = first.run()
    for _ in range(5):
        again = inputs.to(DEVICE)
        for got, want in zip(again.run(), wanted, strict=True):
            assert torch.equal(got, want)
        assert torch.equal(again.mask, first.mask)


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_garbage_behind_the_end_of_a_sequence_changes_nothing(garbage: float) -> None:
    lengths = (37, 4001)
    inputs = make_inputs(Shape(lengths, page=32))
    want, want_lse, _ = inputs.to(DEVICE).run()
    for row, length in enumerate(lengths):
        last = inputs.block_table[row, ceil_div(length, 32) - 1]
        for cache in (inputs.key_cache, inputs.value_cache):
            cache[last, length % 32 :] = garbage
    out, lse, _ = inputs.to(DEVICE).run()
    assert torch.equal(out, want) and torch.equal(lse, want_lse)


def test_nan_in_one_row_stays_there() -> None:
    inputs = make_inputs(Shape((300, 300)))
    want, _, _ = inputs.to(DEVICE).run()
    inputs.value_cache[inputs.block_table[0, 0]] = math.nan
    inputs.query[0] = math.nan
    out, _, _ = inputs.to(DEVICE).run()
    assert out[0].isnan().all() and torch.equal(out[1], want[1])


def test_a_graph_replays_with_other_options_lengths_and_rows() -> None:
    shape = Shape((900, 5000, 77, 300))
    rows = len(shape.lengths)
    inputs = make_inputs(shape).to(DEVICE)
    eager = inputs.to(DEVICE)
    graph = torch.cuda.CUDAGraph()
    inputs.run()
    inputs.mask.copy_(eager.mask)
    with torch.cuda.graph(graph):
        results = inputs.run()
    changes = [
        {"visit_all": [True] * rows},
        {"visit_all": [False] * rows},
        {"thresholds": [-math.inf, -3.0, -6.0, -5.0]},
        {"seq_lens": [890, 0, 77, 256], "slots": [1, 0, 3, 4]},
        {"seq_lens": [900, 4096, 0, 300], "slots": [2, 1, 0, 4], "visit_all": [True, True, False, False]},
        {"seq_lens": [900, 4096, 0, 300], "slots": [2, 1, 0, 4], "visit_all": [False] * 4, "thresholds": [-4.0] * 4},
    ]
    for number, change in enumerate(changes):
        for side in (inputs, eager):
            side.query.copy_(next_query(shape, number))
            for name, values in change.items():
                tensor = getattr(side, name)
                tensor.copy_(torch.tensor(values).to(tensor.dtype))
        graph.replay()
        for got, want in zip(results, eager.run(), strict=True):
            assert torch.equal(got, want)
        assert torch.equal(inputs.mask, eager.mask)


def test_decode_into_adds_to_visited_and_refuses_a_small_workspace() -> None:
    inputs = make_inputs(Shape((300, 5000))).to(DEVICE)
    out, lse = torch.empty_like(inputs.query), torch.empty(inputs.query.shape[:2], device=DEVICE)
    visited = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    size = decode_cuda.workspace_bytes(2, 8, 2, 128, inputs.block_table.shape[1] * 16)
    workspace = torch.full((size,), 255, dtype=torch.uint8, device=DEVICE)
    for _ in range(2):
        decode_cuda.decode_into(out, lse, visited, *inputs.tensors(), inputs.scale, workspace)
    want, want_lse, want_visited = inputs.run()
    assert torch.equal(visited, 2 * want_visited) and torch.equal(out, want) and torch.equal(lse, want_lse)
    with pytest.raises(ValueError, match="workspace: expected at least"):
        decode_cuda.decode_into(out, lse, visited, *inputs.tensors(), inputs.scale, workspace[:-1])


@pytest.mark.parametrize(
    ("dtype", "head_dim", "group", "message"),
    [
        (torch.float32, 64, 1, "query: expected bfloat16 or float16"),
        (torch.bfloat16, 24, 1, "head_dim a multiple of 16"),
        (torch.bfloat16, 272, 1, "head_dim a multiple of 16"),
        (torch.bfloat16, 64, 17, "at most 16 query heads a key head"),
    ],
)
def test_what_the_kernels_do_not_take_is_said(dtype: torch.dtype, head_dim: int, group: int, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        decode_cuda.check_supported(dtype, head_dim, group, DEVICE)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_summaries_equal_the_reference(dtype: torch.dtype, head_dim: int, layout: str) -> None:
    inputs = make_inputs(Shape((300, 77), head_dim=head_dim, page=48, layout=layout, dtype=dtype))
    slots = torch.tensor([15, -1, 31, 40, 47, 96 + 15, 48 + 31])
    want, got = torch.zeros_like(inputs.summaries), torch.zeros_like(inputs.summaries, device=DEVICE)
    key = inputs.to(DEVICE).key_cache
    torch.ops.lite_attention.summarize(key, slots.to(DEVICE), got)
    reference.summarize(inputs.key_cache, slots, want)
    assert ((want != 0).any(-1) == (got.cpu() != 0).any(-1)).all()
    # Sums may differ in their last bits.
    for part, wanted in zip(reference.read_summaries(got.cpu()), reference.read_summaries(want), strict=True):
        torch.testing.assert_close(part, wanted, rtol=0, atol=float(wanted.abs().max()) / 120)
    assert (got.cpu() != want).float().mean() < 1e-3


def test_the_operators_satisfy_opcheck() -> None:
    inputs = make_inputs(Shape((100, 5000))).to(DEVICE)
    torch.library.opcheck(torch.ops.lite_attention.decode.default, (*inputs.tensors(), inputs.scale))
    slots = torch.arange(32, device=DEVICE)
    torch.library.opcheck(torch.ops.lite_attention.summarize.default, (inputs.key_cache, slots, inputs.summaries))
