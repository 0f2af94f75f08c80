"""`lite_attention::forward` on Hopper GPUs against the float64 reference, and what only a GPU can get wrong."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from lite_attention import LiteAttention, SeqParallelLiteAttention, merge_attention, ops, reference
from lite_attention.forward_cuda import summarize_blocks
from lite_attention.options import Rule, needs_lse
from lite_attention.ranges import all_blocks, pack_bits, unpack_bits
from lite_attention.tiles import BLOCK_K, TILE_Q
from tests.library.forward_cases import (
    ALL_RULES,
    RULES,
    SHAPES,
    Inputs,
    Shape,
    State,
    Tolerance,
    assert_mask_agrees,
    assert_result_agrees,
    assert_step_agrees,
    block_bits,
    fresh_state,
    level_inputs,
    make_inputs,
    sparsity_of,
)

DEVICE = "cuda"
TOLERANCES = {
    torch.float16: Tolerance(out=2e-3, norm=8e-4, lse=1e-4, margin=2e-3),
    # The rule running_max compares two weights that are rounded to bfloat16: 2 * log2(1 + 2**-9) log2 units.
    torch.bfloat16: Tolerance(out=1.6e-2, norm=5e-3, lse=1e-4, margin=6e-3),
}
DTYPES = [pytest.param(torch.bfloat16, id="bf16"), pytest.param(torch.float16, id="fp16")]
NEVER = -1000.0
"""A threshold that no block passes, so that the mask stays as it is."""


def why_not() -> str | None:
    """Why these tests cannot run here; None where they can."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return "needs a Hopper GPU"
    return ops.unsupported("forward", torch.empty(1, 1, 1, 64, dtype=torch.bfloat16, device=DEVICE))


REASON = why_not()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(REASON is not None, reason=REASON or ""),
    pytest.mark.usefixtures("one_thread"),
]


def on_device(inputs: Inputs) -> Inputs:
    query, key, value = inputs
    return query.to(DEVICE), key.to(DEVICE), value.to(DEVICE)


def cuda_inputs(shape: Shape, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Inputs:
    return on_device(make_inputs(shape, dtype, seed))


def cuda_state(shape: Shape) -> State:
    return fresh_state(shape).to(DEVICE)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, device=DEVICE)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, attended: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in float64 on the device, of the pairs in bool ``attended`` (..., tokens_q, tokens_k)."""
    group = query.shape[2] // key.shape[2]
    q, k, v = (tensor.double().transpose(1, 2) for tensor in (query, key, value))
    k, v = (tensor.repeat_interleave(group, 1) for tensor in (k, v))
    scores = ((q @ k.mT) * scale).masked_fill(~attended, -math.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().masked_fill(lse[..., None] == -math.inf, 0.0)
    return (weights @ v).transpose(1, 2), lse


def attended_pairs(shape: Shape, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """The pairs of a query and a key that are computed: bool (tokens_q, tokens_k), or with a mask one for each head."""
    attended = torch.ones(shape.tokens_q, shape.tokens_k, dtype=torch.bool, device=DEVICE)
    if causal:
        attended = attended.tril(shape.tokens_k - shape.tokens_q)
    if mask is None:
        return attended
    visits = unpack_bits(mask, shape.blocks).repeat_interleave(TILE_Q, 2).repeat_interleave(BLOCK_K, 3)
    return attended & visits[:, :, : shape.tokens_q, : shape.tokens_k]


def random_mask(shape: Shape, seed: int = 0) -> Tensor:
    """A mask whose tiles differ much in how many blocks they visit."""
    random = torch.Generator().manual_seed(seed)
    share = torch.rand(shape.batch, shape.heads, shape.tiles, 1, generator=random) ** 2
    bits = torch.rand(shape.batch, shape.heads, shape.tiles, shape.blocks, generator=random) < share
    bits[..., 0] = True
    return pack_bits(bits).to(DEVICE)


def dense(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool = False) -> tuple[Tensor, Tensor]:
    return ops.forward(query, key, value, None, None, None, None, None, scale, causal, "running_max")


def step(
    inputs: Inputs,
    state: State,
    thresholds: Tensor,
    rule: Rule,
    *,
    scale: float = 0.125,
    causal: bool = False,
    pairs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return ops.forward(*inputs, *state, thresholds, None, None, scale, causal, rule, pairs_visited=pairs)


def counter() -> Tensor:
    """For the pairs that a step visits."""
    return torch.full((), -1, dtype=torch.int64, device=DEVICE)


def assert_same(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> None:
    """Equal bit for bit; NaN equals NaN."""
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


assert_agrees = functools.partial(assert_step_agrees, tolerances=TOLERANCES)

GPU_SHAPES = {name: shape._replace(head_dim=64) for name, shape in SHAPES.items() if name != "odd head size"} | {
    "whole tiles and blocks": Shape(tokens_q=256, tokens_k=512, head_dim=128),
    "one off a pair of tiles": Shape(tokens_q=257, tokens_k=321, head_dim=128),
    "three blocks": Shape(tokens_q=64, tokens_k=192, head_dim=128),
    "batch of grouped heads": Shape(3, 260, 150, 8, 2, 128),
    "more blocks than 32 words": Shape(1, 70, 33 * 32 * BLOCK_K + 9, 1, 1, 64),
}
CAUSAL_LENGTHS = {"square": (300, 300), "longer keys": (150, 430), "longer queries": (400, 150)}


# Shapes and types


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [7, 64, 72, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_equals_the_formula(dtype: torch.dtype, head_dim: int, causal: bool) -> None:
    shape = Shape(tokens_q=300, tokens_k=330, head_dim=head_dim)
    inputs = cuda_inputs(shape, dtype)
    expected = attend(*inputs, head_dim**-0.5, attended_pairs(shape, causal))
    assert_result_agrees(*dense(*inputs, head_dim**-0.5, causal), *expected, TOLERANCES[dtype])


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("name", GPU_SHAPES)
def test_dense_shapes(name: str, causal: bool) -> None:
    shape = GPU_SHAPES[name]
    inputs = cuda_inputs(shape)
    expected = attend(*inputs, 0.125, attended_pairs(shape, causal))
    assert_result_agrees(*dense(*inputs, 0.125, causal), *expected, TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize("tokens_k", [60, 1000, 1040])
@pytest.mark.parametrize("tokens_q", [150, 200])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_heights_of_tiles(dtype: torch.dtype, head_dim: int, tokens_q: int, tokens_k: int) -> None:
    """A head for each multiprocessor: 192 queries in a tile if it holds them all, else 256 or, of many keys, 128."""
    heads = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    shape = Shape(tokens_q=tokens_q, tokens_k=tokens_k, heads=heads, kv_heads=heads, head_dim=head_dim)
    inputs = cuda_inputs(shape, dtype)
    expected = attend(*inputs, head_dim**-0.5, attended_pairs(shape))
    assert_result_agrees(*dense(*inputs, head_dim**-0.5), *expected, TOLERANCES[dtype])


def assert_some_queries_agree(shape: Shape, dtype: torch.dtype, causal: bool = False) -> None:
    """Compare a few hundred of the queries, at any place in a tile: all of them at once are too much for float64."""
    query, key, value = cuda_inputs(shape, dtype)
    scale = shape.head_dim**-0.5
    out, lse = dense(query, key, value, scale, causal)
    some = torch.arange(0, shape.tokens_q, shape.tokens_q // 250 + 1 | 1, device=DEVICE)
    expected = attend(query[:, some], key, value, scale, attended_pairs(shape, causal)[some])
    assert_result_agrees(out[:, some], lse[:, :, some], *expected, TOLERANCES[dtype])


@pytest.mark.parametrize(
    ("tokens_q", "heads"), [(700, 16), (6200, 4)], ids=["whole pairs of tiles", "a tile without partner"]
)
@pytest.mark.parametrize("tokens_k", [8192, 8256, 8293])
@pytest.mark.parametrize("head_dim", [64, 72, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_with_many_keys(dtype: torch.dtype, head_dim: int, tokens_k: int, tokens_q: int, heads: int) -> None:
    """From 8,192 keys on, two thread blocks share what they fetch, if the head size is from 72 to 128."""
    shape = Shape(batch=2, tokens_q=tokens_q, tokens_k=tokens_k, heads=heads, kv_heads=2, head_dim=head_dim)
    assert_some_queries_agree(shape, dtype)


@pytest.mark.parametrize(
    ("tokens_q", "tokens_k"),
    [(300, 8400), (1100, 9001), (16500, 16500), (20000, 16420)],
    ids=["one pair of tiles", "longer keys", "square", "longer queries"],
)
@pytest.mark.parametrize("head_dim", [96, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_causal_with_many_keys(dtype: torch.dtype, head_dim: int, tokens_k: int, tokens_q: int) -> None:
    """From 8,192 keys a query on, two thread blocks share what they fetch, if the head size is 128."""
    shape = Shape(batch=2, tokens_q=tokens_q, tokens_k=tokens_k, heads=4, kv_heads=2, head_dim=head_dim)
    assert_some_queries_agree(shape, dtype, causal=True)


@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize("head_dim", [7, 64, 72, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_of_every_type_and_head_size(dtype: torch.dtype, head_dim: int, rule: Rule) -> None:
    shape = Shape(tokens_q=200, tokens_k=600, head_dim=head_dim)
    state = cuda_state(shape)
    for seed in range(3):
        assert_agrees(cuda_inputs(shape, dtype, seed), state, [-5.0], rule)


@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize("name", GPU_SHAPES)
def test_steps_of_every_shape(name: str, rule: Rule) -> None:
    """Four steps over drifting inputs, each from the state that the kernel left."""
    shape = GPU_SHAPES[name]
    state = cuda_state(shape)
    query, key, value = cuda_inputs(shape)
    for seed in range(4):
        drift = 0.1 * torch.randn(query.shape, generator=torch.Generator().manual_seed(seed))
        drifted = (query + drift.to(DEVICE)).to(query.dtype)
        assert_agrees((drifted, key, value), state, [-5.0] * shape.batch, rule)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("lengths", CAUSAL_LENGTHS.values(), ids=CAUSAL_LENGTHS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_causal_steps(head_dim: int, lengths: tuple[int, int], rule: Rule) -> None:
    shape = Shape(1, *lengths, heads=4, kv_heads=2, head_dim=head_dim)
    state = cuda_state(shape)
    state.mask.bitwise_and_(~block_bits(shape.blocks, 1).to(DEVICE))
    for seed in range(3):
        assert_agrees(cuda_inputs(shape, seed=seed), state, [-4.0], rule, causal=True)


@pytest.mark.parametrize("scale", [1.0, 0.01, 0.0, -0.125])
@pytest.mark.parametrize("rule", ALL_RULES)
def test_scale(rule: Rule, scale: float) -> None:
    shape = Shape(head_dim=64)
    state = cuda_state(shape)
    for _ in range(2):
        assert_agrees(cuda_inputs(shape), state, [-5.0], rule, scale=scale)


@pytest.mark.parametrize(
    ("batch", "tokens_q", "tokens_k"),
    [(1, 0, 70), (1, 70, 0), (1, 0, 0), (0, 70, 70)],
    ids=["no queries", "no keys", "nothing", "no sequences"],
)
@pytest.mark.parametrize("rule", [None, *ALL_RULES])
def test_empty(batch: int, tokens_q: int, tokens_k: int, rule: Rule | None) -> None:
    shape = Shape(batch, tokens_q, tokens_k, head_dim=64)
    inputs = cuda_inputs(shape)
    if rule is None:
        out, lse = dense(*inputs, 0.125)
    else:
        pairs = counter()
        out, lse = step(inputs, cuda_state(shape), numbers(*[-4.0] * batch), rule, pairs=pairs)
        assert int(pairs) == 0
    assert torch.equal(out, torch.zeros_like(inputs[0]))
    assert torch.equal(lse, torch.full((batch, 2, tokens_q), -math.inf, device=DEVICE))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("rule", RULES)
def test_many_tiles_with_random_masks(rule: Rule, head_dim: int, causal: bool) -> None:
    """More tiles than multiprocessors, each with blocks of its own; the second sequence does not skip."""
    shape = Shape(2, 1500, 2100, 8, 4, head_dim)
    inputs = cuda_inputs(shape)
    state = cuda_state(shape)
    state.mask.copy_(random_mask(shape))
    before = state.copy()
    visits = state.mask.clone()
    visits[1] = all_blocks(shape.blocks)
    pairs = counter()
    out, lse = step(inputs, state, numbers(NEVER, -math.inf), rule, causal=causal, pairs=pairs)
    attended = attended_pairs(shape, causal, visits)
    padded = pad(attended, (0, -shape.tokens_k % BLOCK_K, 0, -shape.tokens_q % TILE_Q))
    of_tiles = padded.unflatten(3, (-1, BLOCK_K)).unflatten(2, (-1, TILE_Q))
    assert int(pairs) == int(of_tiles.any(-1).any(3).sum())
    expected = attend(*inputs, 0.125, attended)
    assert_result_agrees(out, lse, *expected, TOLERANCES[torch.bfloat16])
    assert torch.equal(state.mask, before.mask)


@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_visited_blocks(dtype: torch.dtype, head_dim: int, rule: Rule) -> None:
    """One more in each tile of queries: whatever is over for the last product tiles of two or three blocks."""
    shape = Shape(tokens_q=9 * TILE_Q, tokens_k=12 * BLOCK_K - 3, head_dim=head_dim)
    random = torch.Generator().manual_seed(0)
    places = torch.rand(1, shape.heads, shape.tiles, shape.blocks, generator=random).argsort(-1)
    state = cuda_state(shape)
    state.mask.copy_(pack_bits(places <= torch.arange(shape.tiles)[:, None]))
    for seed in range(3):
        assert_agrees(cuda_inputs(shape, dtype, seed), state, [-5.0], rule)


@pytest.mark.parametrize("rule", RULES)
def test_any_number_of_visited_blocks_of_causal_tiles(rule: Rule) -> None:
    shape = Shape(tokens_q=9 * TILE_Q - 5, tokens_k=9 * TILE_Q - 5, head_dim=128)
    state = cuda_state(shape)
    for seed in range(3):
        assert_agrees(cuda_inputs(shape, seed=seed), state, [-4.0], rule, causal=True)
        state.mask.bitwise_or_(block_bits(shape.blocks, *range(seed, shape.blocks, 3)).to(DEVICE))


@pytest.mark.parametrize("rule", ALL_RULES)
def test_which_rows_come_first_changes_no_bit(rule: Rule) -> None:
    """More rows of the mask than multiprocessors are put in order; those of two heads alone are not."""
    shape = Shape(2, 1500, 2100, 8, 4)
    query, key, value = cuda_inputs(shape)
    state = cuda_state(shape)
    state.mask.copy_(random_mask(shape))
    before = state.copy()
    together = step((query, key, value), state, numbers(-6.0, -3.0), rule)
    for kv_head in range(4):
        heads = slice(2 * kv_head, 2 * kv_head + 2)
        some = State(*(tensor[:, heads].clone() for tensor in before))
        keys, values = (tensor[:, :, kv_head : kv_head + 1] for tensor in (key, value))
        out, lse = step((query[:, :, heads], keys, values), some, numbers(-6.0, -3.0), rule)
        assert_same((out, lse, *some), (together[0][:, :, heads], *(part[:, heads] for part in (together[1], *state))))


# Strides and memory


def packed(inputs: Inputs) -> Inputs:
    """Slices of one tensor (batch, tokens, heads of all three, head_dim)."""
    tokens = max(tensor.shape[1] for tensor in inputs)
    sizes = [tensor.shape[2] for tensor in inputs]
    longer = [pad(tensor, (0, 0, 0, 0, 0, tokens - tensor.shape[1])) for tensor in inputs]
    parts = torch.cat(longer, dim=2).split(sizes, dim=2)
    query, key, value = (part[:, : tensor.shape[1]] for part, tensor in zip(parts, inputs, strict=True))
    return query, key, value


def heads_first(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def channels_first(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 3).contiguous().transpose(1, 3)


def unaligned(tensor: Tensor) -> Tensor:
    wider = torch.full((*tensor.shape[:3], tensor.shape[3] + 3), math.nan, dtype=tensor.dtype, device=tensor.device)
    view = wider[..., 1:-2]
    view.copy_(tensor)
    return view


def followed_by_nan(tensor: Tensor) -> Tensor:
    batch, tokens, heads, head_dim = tensor.shape
    size = (batch, tokens + 2 * TILE_Q, heads, head_dim)
    longer = torch.full(size, math.nan, dtype=tensor.dtype, device=tensor.device)
    longer[:, :tokens] = tensor
    return longer[:, :tokens]


STRIDED = {
    "packed": packed,
    "heads first": lambda inputs: tuple(map(heads_first, inputs)),
    "channels first": lambda inputs: tuple(map(channels_first, inputs)),
    "unaligned": lambda inputs: tuple(map(unaligned, inputs)),
    "one head for all": lambda inputs: (inputs[0], *(tensor[:, :, :1].expand_as(tensor) for tensor in inputs[1:])),
    "one query for all": lambda inputs: (inputs[0][:, :1].expand_as(inputs[0]), *inputs[1:]),
    "one sequence for all": lambda inputs: tuple(tensor[:1].expand_as(tensor) for tensor in inputs),
    "every other token": lambda inputs: tuple(tensor.repeat_interleave(2, 1)[:, ::2] for tensor in inputs),
    "NaN after the end": lambda inputs: tuple(map(followed_by_nan, inputs)),
}


@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize("layout", STRIDED)
def test_strided_inputs(layout: str, rule: Rule) -> None:
    shape = Shape(batch=2, heads=4, head_dim=64)
    inputs = STRIDED[layout](cuda_inputs(shape))
    state, plain = cuda_state(shape), cuda_state(shape)
    for _ in range(2):
        copies = tuple(tensor.contiguous() for tensor in inputs)
        expected = step(copies, plain, numbers(-5.0, -3.0), rule)
        assert_same(step(inputs, state, numbers(-5.0, -3.0), rule), expected)
        assert_same(state, plain)
    assert_agrees(inputs, state, [-5.0, -3.0], rule)


@pytest.mark.parametrize("rule", ALL_RULES)
def test_state_in_a_pool_of_slots(rule: Rule) -> None:
    shape = Shape(batch=2, head_dim=64)
    pool = cuda_state(shape._replace(batch=4))
    state = State(pool.mask[::2], pool.lse[::2])
    others = State(pool.mask[1::2], pool.lse[1::2])
    before = others.copy()
    for _ in range(3):
        assert_agrees(cuda_inputs(shape), state, [-5.0, -3.0], rule)
    assert_same(others, before)


def test_out_is_written_where_it_was_poisoned() -> None:
    shape = Shape(batch=2, tokens_q=333, head_dim=128)
    inputs = cuda_inputs(shape)
    expected = dense(*inputs, 0.125)
    for _ in range(5):
        poison = [torch.full_like(tensor, math.nan) for tensor in expected for _ in range(4)]
        del poison
        assert_same(dense(*inputs, 0.125), expected)


@pytest.mark.parametrize("rule", RULES)
def test_skipped_blocks_are_not_read(rule: Rule) -> None:
    shape = Shape(tokens_k=600, head_dim=128)
    query, key, value = cuda_inputs(shape)
    key[:, BLOCK_K : 3 * BLOCK_K] = math.nan
    value[:, 4 * BLOCK_K : 5 * BLOCK_K] = math.nan
    state = cuda_state(shape)
    state.mask.copy_(block_bits(shape.blocks, 0, 3, 5, 8).expand_as(state.mask))
    visits = state.mask.clone()
    out, lse = step((query, key, value), state, numbers(NEVER), rule)
    clean = (query, key.nan_to_num(), value.nan_to_num())
    expected = attend(*clean, 0.125, attended_pairs(shape, mask=visits))
    assert_result_agrees(out, lse, *expected, TOLERANCES[torch.bfloat16])


# Masks, forced ranges and thresholds


@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_each_sequence_has_its_own_threshold(head_dim: int, rule: Rule) -> None:
    shape = Shape(batch=4, tokens_q=300, tokens_k=900, head_dim=head_dim)
    inputs = cuda_inputs(shape)
    state = cuda_state(shape)
    state.mask.copy_(random_mask(shape) | block_bits(shape.blocks, 3).to(DEVICE))
    off = State(state.mask[3].clone(), state.lse[3].clone())
    for _ in range(3):
        assert_agrees(inputs, state, [-2.0, -6.5, NEVER, -math.inf], rule)
    assert_same((state.mask[3], state.lse[3]), off)


@pytest.mark.parametrize("rule", ALL_RULES)
def test_sequences_do_not_disturb_each_other(rule: Rule) -> None:
    """A sequence gives the same bits alone as in a batch of sequences with other thresholds."""
    shape = Shape(batch=5, tokens_q=500, tokens_k=700, heads=6, kv_heads=2, head_dim=128)
    thresholds = numbers(-2.0, -5.0, -math.inf, -9.0, NEVER)
    together = cuda_state(shape)
    alone = [cuda_state(shape._replace(batch=1)) for _ in range(shape.batch)]
    for seed in range(3):
        inputs = cuda_inputs(shape, seed=seed)
        out, lse = step(inputs, together, thresholds, rule)
        for row, state in enumerate(alone):
            one = slice(row, row + 1)
            query, key, value = (tensor[one] for tensor in inputs)
            assert_same(step((query, key, value), state, thresholds[one], rule), (out[one], lse[one]))
            assert_same(state, (together.mask[one], together.lse[one]))


@pytest.mark.parametrize("rule", ALL_RULES)
def test_threshold_minus_infinity_is_dense_and_leaves_the_state(rule: Rule) -> None:
    shape = Shape(head_dim=64)
    inputs = cuda_inputs(shape)
    state = cuda_state(shape)
    state.mask.fill_(0x5A5A5A5A)
    state.lse.fill_(1.5)
    before = state.copy()
    forced = (block_bits(6, 2).to(DEVICE), block_bits(6, 3).to(DEVICE))
    out, lse = ops.forward(*inputs, *state, numbers(-math.inf), *forced, 0.125, False, rule)
    assert_result_agrees(out, lse, *attend(*inputs, 0.125, attended_pairs(shape)), TOLERANCES[torch.bfloat16])
    assert_same(state, before)


@pytest.mark.parametrize("rule", ALL_RULES)
def test_a_mask_without_bits_visits_everything(rule: Rule) -> None:
    shape = Shape(tokens_q=300, tokens_k=500, head_dim=64)
    state = cuda_state(shape)
    state.mask.zero_()
    assert_agrees(cuda_inputs(shape), state, [-5.0], rule)
    assert state.mask.any(-1).all()


FORCED = {
    "visit": ((1, 4, 9), ()),
    "skip": ((), (0, 5, 9)),
    "both": ((1, 4), (0, 5, 9)),
    "overlap": ((1, 4, 5), (4, 5)),
    "skip all but one": ((), tuple(set(range(10)) - {6})),
    "skip everything": ((2,), tuple(range(10))),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("forced", FORCED.values(), ids=FORCED)
def test_forced_blocks(forced: tuple[tuple[int, ...], tuple[int, ...]], causal: bool, rule: Rule) -> None:
    shape = Shape(tokens_q=300, tokens_k=620, head_dim=64)
    visit, skip = (block_bits(shape.blocks, *chosen) if chosen else None for chosen in forced)
    state = cuda_state(shape)
    state.mask.copy_(random_mask(shape))
    for seed in range(3):
        assert_agrees(cuda_inputs(shape, seed=seed), state, [-3.0], rule, visit, skip, causal)


@pytest.mark.parametrize("rule", ALL_RULES)
def test_bits_past_the_last_block_are_ignored_and_written_as_zero(rule: Rule) -> None:
    shape = Shape(tokens_k=34 * BLOCK_K + 1, head_dim=64)
    clean, dirty = cuda_state(shape), cuda_state(shape)
    dirty.mask.fill_(-1)
    for _ in range(2):
        results = [step(cuda_inputs(shape), state, numbers(-5.0), rule) for state in (clean, dirty)]
        assert_same(*results)
        assert_same(clean, dirty)
    assert not (dirty.mask & ~all_blocks(shape.blocks, DEVICE)).any()


@pytest.mark.parametrize("rule", ALL_RULES)
def test_some_but_not_all_is_skipped(rule: Rule) -> None:
    """The comparisons mean little unless steps like theirs clear some blocks."""
    shape = Shape(tokens_q=1000, tokens_k=1500, heads=4, head_dim=128)
    state = cuda_state(shape)
    for _ in range(3):
        assert_agrees(cuda_inputs(shape), state, [-5.0], rule)
    assert 0.2 < sparsity_of(state.mask, shape.tokens_k) < 0.9


# The rules, by hand


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_running_max_by_hand(dtype: torch.dtype, head_dim: int) -> None:
    inputs = on_device(level_inputs([0.0, -5.0, 3.0, -1.0, 0.0], head_dim=head_dim, dtype=dtype))
    state = cuda_state(Shape(tokens_q=3, tokens_k=5 * BLOCK_K, heads=1))
    step(inputs, state, numbers(-2.5), "running_max", scale=math.log(2))
    # Block 4 comes first, 3 lies 1 below it, 2 above all before it, and 1 and 0 lie 8 and 3 below block 2.
    assert torch.equal(state.mask.flatten().cpu(), block_bits(5, 2, 3, 4))
    assert (state.lse == math.inf).all()


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mass_by_hand(dtype: torch.dtype, head_dim: int) -> None:
    inputs = on_device(level_inputs([0.0, -5.0, 3.0, -1.0, 0.0], head_dim=head_dim, dtype=dtype))
    state = cuda_state(Shape(tokens_q=3, tokens_k=5 * BLOCK_K, heads=1))
    step(inputs, state, numbers(-4.0), "mass", scale=math.log(2))
    assert torch.equal(state.mask.flatten().cpu(), all_blocks(5)), "a fresh state clears nothing"
    lse = math.log(BLOCK_K * (1 + 2**-5 + 8 + 2**-1 + 1))
    torch.testing.assert_close(state.lse, torch.full_like(state.lse, lse), rtol=1e-5, atol=1e-5)
    # Shares are 2**-3.4, -8.4, -0.4, -4.4 and -3.4.
    step(inputs, state, numbers(-4.0), "mass", scale=math.log(2))
    assert torch.equal(state.mask.flatten().cpu(), block_bits(5, 0, 2, 4))


@pytest.mark.parametrize("row", [0, 7, 8, 63, 64, 127, 128, 129])
@pytest.mark.parametrize("rule", ALL_RULES)
def test_one_row_that_needs_a_block_keeps_it(rule: Rule, row: int) -> None:
    query, key, value = on_device(level_inputs([-9.0, -9.0, 0.0], tokens_q=130, head_dim=64, dtype=torch.bfloat16))
    query[:, row] = -1.0
    state = cuda_state(Shape(tokens_q=130, tokens_k=3 * BLOCK_K, heads=1))
    for _ in range(2):
        step((query, key, value), state, numbers(-4.0), rule, scale=math.log(2))
    keeps, clears = state.mask[0, 0, row // TILE_Q], state.mask[0, 0, 1 - row // TILE_Q]
    assert torch.equal(keeps.cpu(), block_bits(3, 0, 1, 2))
    assert torch.equal(clears.cpu(), block_bits(3, 2))


@pytest.mark.parametrize("tokens_q", [1, 65, 127, 129])
@pytest.mark.parametrize("rule", ALL_RULES)
def test_rows_past_the_end_never_keep_a_block(rule: Rule, tokens_q: int) -> None:
    query, key, value = on_device(level_inputs([-9.0, -9.0, 0.0], tokens_q, head_dim=64, dtype=torch.bfloat16))
    longer = query.repeat(1, 300 // tokens_q + 1, 1, 1)[:, :300].clone()
    longer[:, tokens_q:] = math.nan
    state = cuda_state(Shape(tokens_q=tokens_q, tokens_k=3 * BLOCK_K, heads=1))
    for _ in range(2):
        step((longer[:, :tokens_q], key, value), state, numbers(-4.0), rule, scale=math.log(2))
    assert (state.mask.cpu() == block_bits(3, 2)).all()


def test_mass_far_below_the_maximum_is_kept() -> None:
    """A share of 2**-300 underflows float32: where the threshold is as low, the block stays, as the rule allows."""
    inputs = on_device(level_inputs([-300.0, 0.0], head_dim=64, dtype=torch.float16))
    state = cuda_state(Shape(tokens_q=3, tokens_k=2 * BLOCK_K, heads=1))
    for threshold, kept in ((-301.0, (0, 1)), (-301.0, (0, 1)), (-299.0, (0, 1)), (-90.0, (1,))):
        step(inputs, state, numbers(threshold), "mass", scale=math.log(2))
        assert torch.equal(state.mask.flatten().cpu(), block_bits(2, *kept))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_a_tile_is_never_left_without_blocks(causal: bool) -> None:
    shape = Shape(tokens_q=130, tokens_k=5 * BLOCK_K, heads=1)
    inputs = on_device(level_inputs([0.0] * 5, shape.tokens_q, head_dim=64, dtype=torch.bfloat16))
    state = cuda_state(shape)
    for _ in range(2):
        step(inputs, state, numbers(-1.0), "mass", causal=causal)
    assert torch.equal(unpack_bits(state.mask, 5).sum(-1).cpu(), torch.ones(1, 1, 2, dtype=torch.int64))
    assert state.mask[0, 0, 1] == block_bits(5, 4).to(DEVICE), "the first one visited stays"


# Summaries


@pytest.mark.parametrize("head_dim", [8, 64, 80, 128, 256])
@pytest.mark.parametrize("tokens_k", [1, 64, 200, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_summaries_of_blocks(dtype: torch.dtype, tokens_k: int, head_dim: int) -> None:
    """Within a rounding of the reference, whose sums may fall to the other side of it."""
    shape = Shape(batch=2, tokens_k=tokens_k, heads=3, kv_heads=3, head_dim=head_dim)
    _, key, value = make_inputs(shape, dtype)
    key[:, :, 0] += 100.0
    key[:, :, 1] *= 1000.0
    expected = torch.stack(reference.summarize_blocks(key, value))
    for layout in ("contiguous", "packed", "heads first"):
        _, on_key, on_value = STRIDED.get(layout, tuple)((key.to(DEVICE), key.to(DEVICE), value.to(DEVICE)))
        found = summarize_blocks(on_key, on_value, None).cpu()
        torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


def test_a_block_that_must_be_skipped_has_an_empty_summary() -> None:
    shape = Shape(tokens_k=40 * BLOCK_K - 3, head_dim=64)
    _, key, value = cuda_inputs(shape)
    expected = summarize_blocks(key, value, None)
    expected[:, :, [3, 39]] = 0.0
    key[:, 3 * BLOCK_K + 5] = value[:, -1] = math.nan
    found = summarize_blocks(key, value, block_bits(shape.blocks, 3, 39).to(DEVICE))
    assert_same((found,), (expected,))


def step_with_summaries(
    inputs: Inputs, state: State, thresholds: Tensor, margin: float, scale: float = 0.125
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, log-sum-exp, and masks at thresholds less and plus ``margin``: the reference for much, on the device."""
    group = inputs[0].shape[2] // inputs[1].shape[2]
    summaries = torch.stack(reference.summarize_blocks(*(tensor.cpu() for tensor in inputs[1:]))).to(DEVICE)
    q = inputs[0].double().transpose(1, 2)
    k, v, mean, variance, mean_value = (
        tensor.double().transpose(1, 2).repeat_interleave(group, 1) for tensor in (*inputs[1:], *summaries)
    )
    tokens_q, tokens_k, blocks = q.shape[2], k.shape[2], mean.shape[2]
    scores = pad((q @ k.mT) * scale, (0, blocks * BLOCK_K - tokens_k), value=-math.inf).unflatten(-1, (blocks, BLOCK_K))
    count = torch.tensor([min(BLOCK_K, tokens_k - i * BLOCK_K) for i in range(blocks)], device=DEVICE)
    extra = reference.spread((q * scale).square() @ variance.mT, reference.SUMMARY_BEND) / reference.LOG2_E
    estimates = count.log() + (q @ mean.mT) * scale + extra
    visits = unpack_bits(state.mask, blocks)
    visited = visits.repeat_interleave(TILE_Q, 2)[:, :, :tokens_q]
    mass = torch.where(visited, scores.logsumexp(-1), estimates)
    lse = mass.logsumexp(-1)
    weights = (scores - lse[..., None, None]).exp().masked_fill(~visited[..., None], 0.0).flatten(-2)
    stand_ins = (estimates - lse[..., None]).exp().masked_fill(visited, 0.0)
    out = (weights[..., :tokens_k] @ v + stand_ins @ mean_value).transpose(1, 2)

    def kept(thresholds: Tensor) -> Tensor:
        wanted = (mass - state.lse[..., None]) * reference.LOG2_E > thresholds[:, None, None, None]
        bits = pad(wanted, (0, 0, 0, -tokens_q % TILE_Q)).unflatten(2, (-1, TILE_Q)).any(3)
        first = visits.flip(-1).cumsum(-1).flip(-1) == 1
        return pack_bits(torch.where(bits.any(-1, keepdim=True), bits, visits & first))

    return out, lse, kept(thresholds - margin), kept(thresholds + margin)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_from_random_masks_with_summaries(dtype: torch.dtype, head_dim: int) -> None:
    """More tiles of queries than multiprocessors, each with blocks of its own, of grouped heads."""
    shape = Shape(2, 900, 2500, 12, 4, head_dim)
    state = cuda_state(shape)
    state.mask.copy_(random_mask(shape))
    state.lse.fill_(6.0)
    query, key, value = cuda_inputs(shape, dtype)
    for seed, thresholds in enumerate(([-5.0, -8.0], [-3.0, -6.0], [-7.0, -4.0])):
        drift = 0.1 * torch.randn(query.shape, generator=torch.Generator().manual_seed(seed))
        inputs = ((query + drift.to(DEVICE)).to(dtype), key, value)
        expected = step_with_summaries(inputs, state, numbers(*thresholds), TOLERANCES[dtype].margin)
        out, lse = step(inputs, state, numbers(*thresholds), "mass_summaries")
        assert_result_agrees(out, lse, *expected[:2], TOLERANCES[dtype])
        assert_mask_agrees(state.mask, *expected[2:])
        assert_same((state.lse,), (lse,))
    assert 0.1 < sparsity_of(state.mask, shape.tokens_k) < 0.95


@pytest.mark.parametrize("tokens_k", [64, 65, 32 * BLOCK_K, 64 * BLOCK_K + 1, 96 * BLOCK_K - 1, 1024 * BLOCK_K + 70])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_tiles_of_summaries_at_their_edges(head_dim: int, tokens_k: int) -> None:
    shape = Shape(tokens_q=20, tokens_k=tokens_k, heads=2, kv_heads=1, head_dim=head_dim)
    state = cuda_state(shape)
    state.mask.copy_(random_mask(shape))
    state.lse.fill_(8.0)
    for seed in range(2):
        assert_agrees(cuda_inputs(shape, seed=seed), state, [-5.0], "mass_summaries")


@pytest.mark.parametrize("forced", FORCED.values(), ids=FORCED)
def test_forced_blocks_with_summaries(forced: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    shape = Shape(tokens_q=300, tokens_k=620, head_dim=128)
    visit, skip = (block_bits(shape.blocks, *chosen) if chosen else None for chosen in forced)
    state = cuda_state(shape)
    state.mask.copy_(random_mask(shape))
    for seed in range(3):
        assert_agrees(cuda_inputs(shape, seed=seed), state, [-3.0], "mass_summaries", visit, skip)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_must_be_skipped_is_not_summarized(dtype: torch.dtype) -> None:
    shape = Shape(tokens_k=6 * BLOCK_K, head_dim=128)
    query, key, value = cuda_inputs(shape, dtype)
    skip = block_bits(6, 1, 4).to(DEVICE)
    results = []
    for poison in (0.0, math.nan, math.inf):
        key[:, BLOCK_K : 2 * BLOCK_K] = poison
        value[:, 4 * BLOCK_K : 5 * BLOCK_K] = poison
        state = cuda_state(shape)
        state.mask.copy_(block_bits(6, 0, 1, 5).expand_as(state.mask))
        arguments = (*state, numbers(-4.0), None, skip, 0.125, False, "mass_summaries")
        results.append((*ops.forward(query, key, value, *arguments), *state))
    assert not results[0][0].isnan().any()
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mass_summaries_by_hand(dtype: torch.dtype, head_dim: int) -> None:
    inputs = on_device(level_inputs([0.0, -5.0, 3.0, -1.0, 0.0], head_dim=head_dim, dtype=dtype))
    state = cuda_state(Shape(tokens_q=3, tokens_k=5 * BLOCK_K, heads=1))
    mass = BLOCK_K * (1 + 2**-5 + 8 + 2**-1 + 1)
    for kept in ((0, 1, 2, 3, 4), (0, 2, 4), (0, 2, 4)):
        # A block's keys are equal, so that its summary weighs as much: shares are 2**-3.4, -8.4, -0.4, -4.4 and -3.4.
        _, lse = step(inputs, state, numbers(-4.0), "mass_summaries", scale=math.log(2))
        torch.testing.assert_close(lse, torch.full_like(lse, math.log(mass)), rtol=1e-4, atol=1e-4)
        assert torch.equal(state.mask.flatten().cpu(), block_bits(5, *kept))
    query, key, value = inputs
    key[:, BLOCK_K : 2 * BLOCK_K, :, 0] = 2.0
    step((query, key, value), state, numbers(-4.0), "mass_summaries", scale=math.log(2))
    assert torch.equal(state.mask.flatten().cpu(), block_bits(5, 0, 1, 2, 4)), "block 1 comes back unvisited"


@pytest.mark.parametrize("levels", [[60.0, 0.0, -60.0], [-60.0, 0.0, 60.0], [13.0, 10.0, 0.0], [100.0, 99.0, -100.0]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_summaries_far_from_what_is_visited(dtype: torch.dtype, levels: list[float]) -> None:
    """An estimate may outweigh what was visited by more than a weight can say."""
    inputs = on_device(level_inputs(levels, 150, head_dim=128, dtype=dtype))
    state = cuda_state(Shape(tokens_q=150, tokens_k=3 * BLOCK_K, heads=1))
    state.mask.copy_(block_bits(3, 2).expand_as(state.mask))
    state.lse.zero_()
    for _ in range(2):
        assert_agrees(inputs, state, [-9.0], "mass_summaries", scale=math.log(2))


@pytest.mark.parametrize("row", [0, 7, 8, 63, 64, 127, 128, 129])
@pytest.mark.parametrize("block", [0, 1, 9, 30, 33, 62])
def test_one_row_brings_a_block_back(row: int, block: int) -> None:
    levels = [-9.0] * 63 + [0.0]
    query, key, value = on_device(level_inputs(levels, tokens_q=130, head_dim=64, dtype=torch.bfloat16))
    query[..., 1] = 0.0
    query[:, row, :, 1] = 1.0
    key[:, block * BLOCK_K : (block + 1) * BLOCK_K, :, 1] = 9.0
    state = cuda_state(Shape(tokens_q=130, tokens_k=64 * BLOCK_K, heads=1))
    state.mask.copy_(block_bits(64, 63).expand_as(state.mask))
    state.lse.fill_(math.log(BLOCK_K))
    step((query, key, value), state, numbers(-4.0), "mass_summaries", scale=math.log(2))
    for tile in range(2):
        kept = (block, 63) if tile == row // TILE_Q else (63,)
        assert torch.equal(state.mask[0, 0, tile].cpu(), block_bits(64, *kept))


# NaN and infinity


@pytest.mark.parametrize("block", [0, 2, 5])
@pytest.mark.parametrize("rule", ALL_RULES)
def test_a_block_with_nan_is_kept_and_hurts_its_head_only(rule: Rule, block: int) -> None:
    shape = Shape(head_dim=64)
    query, key, value = cuda_inputs(shape)
    clean, state = cuda_state(shape), cuda_state(shape)
    step((query, key, value), clean, numbers(-5.0), rule)
    step((query, key, value), state, numbers(-5.0), rule)
    state.mask.copy_(all_blocks(shape.blocks))
    clean.mask.copy_(state.mask)
    poisoned = key.clone()
    poisoned[0, block * BLOCK_K + 3, 0, 5] = math.nan
    out, lse = step((query, poisoned, value), state, numbers(-5.0), rule)
    expected_out, expected_lse = step((query, key, value), clean, numbers(-5.0), rule)
    assert out[:, :, 0].isnan().all()
    assert unpack_bits(state.mask, shape.blocks)[0, 0, :, block].all()
    assert_same(
        (out[:, :, 1], lse[:, 1], state.mask[:, 1]), (expected_out[:, :, 1], expected_lse[:, 1], clean.mask[:, 1])
    )


@pytest.mark.parametrize("row", [0, 77, 130, 199])
@pytest.mark.parametrize("rule", ALL_RULES)
def test_a_query_of_nan_keeps_every_block_of_its_tile_and_hurts_its_row_only(rule: Rule, row: int) -> None:
    shape = Shape(head_dim=64)
    query, key, value = cuda_inputs(shape)
    state = cuda_state(shape)
    if needs_lse(rule):
        state.lse.fill_(10.0)
    expected_out, expected_lse = dense(query, key, value, 0.125)
    query[0, row, 0] = math.nan
    out, lse = step((query, key, value), state, numbers(-2.0), rule)
    assert out[0, row, 0].isnan().all()
    assert torch.equal(state.mask[0, 0, row // TILE_Q], all_blocks(shape.blocks, DEVICE))
    out[0, row, 0], lse[0, 0, row] = expected_out[0, row, 0], expected_lse[0, 0, row]
    expected = attend(*cuda_inputs(shape), 0.125, attended_pairs(shape))
    assert_result_agrees(out, lse, *expected, TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize("rule", ALL_RULES)
def test_a_block_of_plus_infinity_is_kept(rule: Rule) -> None:
    query, key, value = on_device(level_inputs([-20.0, math.inf, 0.0], head_dim=64, dtype=torch.bfloat16))
    key[:, :, :, 1:] = 0.0
    state = cuda_state(Shape(tokens_q=3, tokens_k=3 * BLOCK_K, heads=1))
    state.lse.zero_()
    step((query, key, value), state, numbers(-9.0), rule, scale=math.log(2))
    assert unpack_bits(state.mask, 3)[0, 0, 0, 1]


@pytest.mark.parametrize("levels", [[0.0, -math.inf, -math.inf], [-math.inf, 0.0, 1.0], [-math.inf] * 3])
@pytest.mark.parametrize("rule", RULES)
def test_scores_of_minus_infinity(rule: Rule, levels: list[float]) -> None:
    """Blocks without finite score go, save the first one visited, and leave no NaN behind."""
    query, key, _ = level_inputs(levels, head_dim=64, dtype=torch.bfloat16)
    state = cuda_state(Shape(tokens_q=3, tokens_k=3 * BLOCK_K, heads=1))
    for _ in range(2):
        assert_agrees(on_device((query, key, torch.ones_like(key))), state, [-9.0], rule, scale=math.log(2))


# Streams, graphs and compilers


@pytest.mark.parametrize("rule", [None, *ALL_RULES])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_runs_are_equal_bit_for_bit(head_dim: int, rule: Rule | None) -> None:
    shape = Shape(2, 1500, 2100, 8, 4, head_dim)
    inputs = cuda_inputs(shape)
    mask = random_mask(shape)
    results: list[tuple[Tensor, ...]] = []
    for _ in range(5):
        if rule is None:
            results.append(dense(*inputs, 0.125))
            continue
        state = State(mask.clone(), torch.full((2, 8, 1500), 9.0, device=DEVICE))
        results.append((*step(inputs, state, numbers(-5.0, -9.0), rule), *state))
    for result in results[1:]:
        assert_same(result, results[0])


@pytest.mark.parametrize("rule", ALL_RULES)
def test_a_graph_replays_with_other_inputs_and_thresholds(rule: Rule) -> None:
    shape = Shape(batch=2, tokens_q=300, tokens_k=500, head_dim=128)
    inputs, thresholds = cuda_inputs(shape), numbers(-5.0, -5.0)
    state, eager = cuda_state(shape), cuda_state(shape)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(inputs, state.copy(), thresholds, rule)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out, lse = step(inputs, state, thresholds, rule)
    for seed, changed in enumerate([(-5.0, -3.0), (-9.0, -math.inf), (-2.0, NEVER)]):
        for tensor, fresh in zip(inputs, cuda_inputs(shape, seed=seed), strict=True):
            tensor.copy_(fresh)
        thresholds.copy_(numbers(*changed))
        if seed == 2:
            state.mask.copy_(random_mask(shape))
        eager.mask.copy_(state.mask)
        graph.replay()
        assert_same((out, lse), step(inputs, eager, thresholds, rule))
        assert_same(state, eager)


@pytest.mark.parametrize("rule", ALL_RULES)
def test_the_current_stream_is_used(rule: Rule) -> None:
    """The inputs arrive late on a stream of their own, and the work must wait for them."""
    shape = Shape(head_dim=64)
    source = cuda_inputs(shape)
    expected_state, state = cuda_state(shape), cuda_state(shape)
    expected = step(source, expected_state, numbers(-5.0), rule)
    query, key, value = (torch.full_like(tensor, math.nan) for tensor in source)
    thresholds = numbers(-5.0)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for late, tensor in zip((query, key, value), source, strict=True):
            late.copy_(tensor)
        result = step((query, key, value), state, thresholds, rule)
    stream.synchronize()
    assert_same(result, expected)
    assert_same(state, expected_state)


def test_two_streams_do_not_disturb_each_other() -> None:
    shapes = [Shape(2, 900, 1300, 8, 2, 128), Shape(3, 700, 900, 4, 4, 64)]
    inputs = [cuda_inputs(shape) for shape in shapes]
    thresholds = [numbers(*[-5.0] * shape.batch) for shape in shapes]
    alone = [cuda_state(shape) for shape in shapes]
    together = [cuda_state(shape) for shape in shapes]
    expected = [[step(inputs[i], alone[i], thresholds[i], RULES[i]) for _ in range(10)] for i in range(2)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in shapes]
    results: list[list[tuple[Tensor, Tensor]]] = [[], []]
    for _ in range(10):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(step(inputs[i], together[i], thresholds[i], RULES[i]))
    torch.cuda.synchronize()
    for i in range(2):
        assert_same(together[i], alone[i])
        for result, one in zip(results[i], expected[i], strict=True):
            assert_same(result, one)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("rule", ALL_RULES)
def test_compiles_as_one_graph(rule: Rule, backend: str) -> None:
    shape = Shape(head_dim=64)
    inputs, thresholds = cuda_inputs(shape), numbers(-5.0)

    def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, lse: Tensor) -> Tensor:
        out, _ = step((query * 2, key, value), State(mask, lse), thresholds, rule)
        return out + 1

    compiled = torch.compile(attention, fullgraph=True, backend=backend)
    state, eager = cuda_state(shape), cuda_state(shape)
    for _ in range(2):
        assert_same((compiled(*inputs, *state),), (attention(*inputs, *eager),))
        assert_same(state, eager)


@pytest.mark.parametrize("tracked", ["dense", "running_max", "mass", "mass_summaries", "forced"])
def test_operator_is_registered_correctly(tracked: str) -> None:
    shape = Shape(tokens_q=130, tokens_k=70, head_dim=64)
    state = cuda_state(shape)
    word = block_bits(2, 0).to(DEVICE)
    optional: dict[str, tuple[Tensor | None, ...]] = {
        "dense": (None, None, None, None, None),
        "running_max": (state.mask, None, numbers(-4.0), None, None),
        "mass": (state.mask, state.lse, numbers(-4.0), None, None),
        "mass_summaries": (state.mask, state.lse, numbers(-4.0), None, None),
        "forced": (state.mask, state.lse, numbers(-4.0), word, word),
    }
    rule = tracked if tracked in ALL_RULES else "mass"
    torch.library.opcheck(
        torch.ops.lite_attention.forward.default,
        (*cuda_inputs(shape), *optional[tracked], 0.25, False, rule),
        {"pairs_visited": torch.zeros((), dtype=torch.int64, device=DEVICE)} if tracked == "forced" else {},
    )


# Modules


def moving_inputs(seed: int) -> Inputs:
    """Inputs of a step whose decisions are clear at a threshold of -3.25: scores are whole numbers times a factor."""
    random = torch.Generator().manual_seed(seed)
    query, key, _ = level_inputs(torch.randint(-9, 9, (12,), generator=random).tolist(), 300, 64, torch.bfloat16)
    query = query.expand(-1, -1, 2, -1) * torch.tensor([1.0, 0.5])[:, None].to(query.dtype)
    return query, key, torch.randn(key.shape, generator=random).to(key.dtype)


@pytest.mark.parametrize("rule", ALL_RULES)
def test_module_takes_the_steps_that_it_takes_on_the_cpu(rule: Rule) -> None:
    on_gpu = LiteAttention(-3.25, rule=rule, refresh_interval=3)
    on_cpu = LiteAttention(-3.25, rule=rule, refresh_interval=3)
    sparsities = []
    for seed, visit_all in ((0, True), (0, True), (1, False), (1, False), (2, True), (2, False)):
        inputs = moving_inputs(seed)
        options = {"return_softmax_lse": True, "visit_all": visit_all}
        out, lse = on_gpu(*on_device(inputs), math.log(2), **options)
        expected_out, expected_lse = on_cpu(*(x.float() for x in inputs), math.log(2), **options)
        assert_result_agrees(out, lse, expected_out.double(), expected_lse.double(), TOLERANCES[torch.bfloat16])
        assert on_gpu.skip_state is not None and on_cpu.skip_state is not None
        assert torch.equal(on_gpu.skip_state.mask.cpu(), on_cpu.skip_state.mask)
        assert on_gpu.sparsity == pytest.approx(on_cpu.sparsity)
        sparsities.append(on_gpu.sparsity or 0.0)
    assert max(sparsities) > 0.2, "nothing was skipped"


def test_module_that_does_not_skip_is_dense() -> None:
    inputs = on_device(moving_inputs(0))
    layer = LiteAttention(-2.0)
    for _ in range(2):
        layer(*inputs)
    assert layer.skip_state is not None
    mask = layer.skip_state.mask.clone()
    layer.enable_skip_optimization(False)
    assert_same(layer(*inputs, return_softmax_lse=True), dense(*inputs, 0.125))
    assert torch.equal(layer.skip_state.mask, mask)


def test_module_in_float32_is_dense_and_says_so() -> None:
    inputs = on_device(make_inputs(Shape(head_dim=64)))
    layer = LiteAttention(-2.0)
    with pytest.warns(UserWarning, match="float32.*nothing is skipped"):
        out = layer(*inputs)
    expected, _ = attend(*inputs, 0.125, attended_pairs(Shape()))
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-3)
    assert layer.sparsity == 0.0


@pytest.mark.parametrize("rule", RULES)
def test_splits_merge_into_what_they_are_on_the_cpu(rule: Rule) -> None:
    on_gpu = SeqParallelLiteAttention(2, -3.25, rule=rule)
    on_cpu = SeqParallelLiteAttention(2, -3.25, rule=rule)
    for seed in (0, 0, 1):
        query, key, value = moving_inputs(seed)
        parts, expected = [], []
        for split, half in enumerate((slice(0, 400), slice(400, None))):
            inputs = (query, key[:, half], value[:, half])
            parts.append(on_gpu(*on_device(inputs), split, math.log(2)))
            expected.append(on_cpu(*(tensor.float() for tensor in inputs), split, math.log(2)))
        merged = merge_attention(*zip(*parts, strict=True))
        expected_out, expected_lse = merge_attention(*zip(*expected, strict=True))
        # The parts are rounded before they are merged.
        assert_result_agrees(*merged, expected_out.double(), expected_lse.double(), TOLERANCES[torch.bfloat16])
        assert on_gpu.sparsity == pytest.approx(on_cpu.sparsity)


# Errors


def valid_arguments() -> dict[str, object]:
    shape = Shape(2, 130, 70, 4, 2, 64)
    query, key, value = cuda_inputs(shape)
    state = cuda_state(shape)
    return {
        "query": query,
        "key": key,
        "value": value,
        "mask": state.mask,
        "lse_state": state.lse,
        "thresholds": numbers(-4.0, -4.0),
        "must_visit": block_bits(2, 0).to(DEVICE),
        "must_skip": block_bits(2, 1).to(DEVICE),
        "scale": 1.0,
        "causal": False,
        "rule": "mass",
    }


WRONG = {
    "query of rank 3": ("query", torch.zeros(2, 130, 64, dtype=torch.bfloat16), "query: expected"),
    "query of float64": ("query", torch.zeros(2, 130, 4, 64, dtype=torch.float64), "query: expected .*float64"),
    "heads that do not divide": ("query", torch.zeros(2, 130, 3, 64, dtype=torch.bfloat16), "key: expected .*3 heads"),
    "key of another size": ("key", torch.zeros(2, 70, 2, 80, dtype=torch.bfloat16), "key: expected"),
    "key of another type": ("key", torch.zeros(2, 70, 2, 64, dtype=torch.float16), "key: expected"),
    "value of another length": ("value", torch.zeros(2, 71, 2, 64, dtype=torch.bfloat16), "value: expected"),
    "mask of another shape": ("mask", torch.ones(2, 4, 1, 1, dtype=torch.int32), "mask: expected"),
    "mask of another type": ("mask", torch.ones(2, 4, 2, 1), "mask: expected"),
    "no mask": ("mask", None, "lse_state: expected None"),
    "lse_state of another shape": ("lse_state", torch.zeros(2, 130, 4), "lse_state: expected"),
    "no lse_state": ("lse_state", None, "lse_state: expected a tensor"),
    "one threshold": ("thresholds", torch.zeros(1), "thresholds: expected"),
    "no thresholds": ("thresholds", None, "thresholds: expected a tensor"),
    "must_visit of two words": ("must_visit", torch.zeros(2, dtype=torch.int32), "must_visit: expected"),
    "must_skip of another type": ("must_skip", torch.zeros(1), "must_skip: expected"),
    "unknown rule": ("rule", "max", "rule: expected"),
}


@pytest.mark.parametrize(("name", "value", "message"), WRONG.values(), ids=WRONG)
def test_errors_name_the_argument(name: str, value: object, message: str) -> None:
    wrong = value.to(DEVICE) if isinstance(value, Tensor) else value
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        torch.ops.lite_attention.forward(*(valid_arguments() | {name: wrong}).values())


@pytest.mark.parametrize("name", ["key", "mask", "lse_state", "thresholds", "must_visit", "must_skip"])
def test_tensors_of_another_device_are_refused(name: str) -> None:
    arguments = valid_arguments()
    elsewhere = arguments[name]
    assert isinstance(elsewhere, Tensor)
    with pytest.raises((TypeError, ValueError, RuntimeError), match=f"{name}: expected"):
        torch.ops.lite_attention.forward(*(arguments | {name: elsewhere.cpu()}).values())


@pytest.mark.parametrize(
    ("dtype", "head_dim", "message"),
    [(torch.float32, 64, "float32"), (torch.bfloat16, 264, "264")],
    ids=["float32", "head size 264"],
)
def test_what_the_kernel_cannot_do_is_refused(dtype: torch.dtype, head_dim: int, message: str) -> None:
    query, key, value = cuda_inputs(Shape(head_dim=head_dim), dtype)
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        dense(query, key, value, 0.125)
    assert message in (ops.unsupported("forward", query) or "")
