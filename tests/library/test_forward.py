"""`lite_attention::forward`: the reference against PyTorch and rules worked out by hand, CPU against it."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lite_attention import ops, reference
from lite_attention.options import Rule
from lite_attention.ranges import all_blocks, unpack_bits
from lite_attention.tiles import BLOCK_K
from tests.library.forward_cases import (
    ALL_RULES,
    CPU_TOLERANCE,
    RULES,
    SHAPES,
    Inputs,
    Shape,
    assert_step_agrees,
    block_bits,
    fresh_state,
    level_inputs,
    make_inputs,
    sparsity_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")

IMPLEMENTATIONS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "reference": reference.forward,
    "cpu": ops.forward,
}


def dense(query: Tensor, key: Tensor, value: Tensor, causal: bool = False) -> Tensor:
    """PyTorch's attention in float64."""
    q, k, v = (tensor.double().transpose(1, 2) for tensor in (query, key, value))
    attended = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    if causal:
        attended = attended.tril(k.shape[2] - q.shape[2])
    return scaled_dot_product_attention(q, k, v, attn_mask=attended, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_dense_equals_pytorch(name: str, causal: bool, implementation: str) -> None:
    shape = SHAPES[name]
    inputs = make_inputs(shape)
    forward = IMPLEMENTATIONS[implementation]
    out, lse = forward(*inputs, None, None, None, None, None, shape.head_dim**-0.5, causal, "mass")
    expected = dense(*inputs, causal=causal)
    attends = torch.arange(shape.tokens_q) + shape.tokens_k - shape.tokens_q >= 0
    if causal:
        expected[:, ~attends] = 0.0
        assert (lse[:, :, ~attends] == -math.inf).all()
    torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("rule", ALL_RULES)
def test_dense_reference_in_float64_is_exact(rule: Rule) -> None:
    query, key, value = (tensor.double() for tensor in make_inputs(Shape(heads=4)))
    out, lse = reference.forward(query, key, value, None, None, None, None, None, 0.25, False, rule)
    torch.testing.assert_close(out, dense(query, key, value), rtol=1e-12, atol=1e-12)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key.repeat_interleave(2, 2)) * 0.25
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("tokens_q", "tokens_k"), [(0, 70), (70, 0), (0, 0)], ids=["no queries", "no keys", "nothing"])
@pytest.mark.parametrize("rule", ALL_RULES)
def test_empty_sequences(implementation: str, tokens_q: int, tokens_k: int, rule: Rule) -> None:
    shape = Shape(tokens_q=tokens_q, tokens_k=tokens_k)
    state, pairs = fresh_state(shape), torch.full((), -1, dtype=torch.int64)
    arguments = (*make_inputs(shape), state.mask, state.lse, torch.tensor([-4.0]), None, None, 1.0, False, rule)
    out, lse = IMPLEMENTATIONS[implementation](*arguments, pairs_visited=pairs)
    assert torch.equal(out, torch.zeros(1, tokens_q, 2, 16))
    assert torch.equal(lse, torch.full((1, 2, tokens_q), -math.inf))
    assert int(pairs) == 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_empty_batch(implementation: str) -> None:
    shape = Shape(batch=0)
    state, pairs = fresh_state(shape), torch.full((), -1, dtype=torch.int64)
    arguments = (*make_inputs(shape), state.mask, state.lse, torch.zeros(0), None, None, 1.0, False, "mass")
    out, lse = IMPLEMENTATIONS[implementation](*arguments, pairs_visited=pairs)
    assert out.shape == (0, 200, 2, 16)
    assert lse.shape == (0, 2, 200)
    assert int(pairs) == 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_running_max_by_hand(implementation: str) -> None:
    inputs = level_inputs([0.0, -5.0, 3.0, -1.0, 0.0])
    state = fresh_state(Shape(tokens_q=3, tokens_k=5 * BLOCK_K, heads=1))
    IMPLEMENTATIONS[implementation](
        *inputs, state.mask, None, torch.tensor([-2.0]), None, None, math.log(2), False, "running_max"
    )
    # Block 4 comes first, 3 lies 1 below it, 2 above all before it, and 1 and 0 lie 8 and 3 below block 2.
    assert torch.equal(state.mask.flatten(), block_bits(5, 2, 3, 4))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_mass_by_hand(implementation: str) -> None:
    inputs = level_inputs([0.0, -5.0, 3.0, -1.0, 0.0])
    state = fresh_state(Shape(tokens_q=3, tokens_k=5 * BLOCK_K, heads=1))
    forward = IMPLEMENTATIONS[implementation]
    arguments = (torch.tensor([-4.0]), None, None, math.log(2), False, "mass")
    forward(*inputs, state.mask, state.lse, *arguments)
    assert torch.equal(state.mask.flatten(), all_blocks(5)), "a fresh state clears nothing"
    lse = math.log(BLOCK_K * (1 + 2**-5 + 8 + 2**-1 + 1))
    torch.testing.assert_close(state.lse, torch.full((1, 1, 3), lse))
    # Shares are 2**-3.4, -8.4, -0.4, -4.4 and -3.4.
    forward(*inputs, state.mask, state.lse, *arguments)
    assert torch.equal(state.mask.flatten(), block_bits(5, 0, 2, 4))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_row_that_needs_a_block_keeps_it(implementation: str) -> None:
    query, key, value = level_inputs([-9.0, 0.0], tokens_q=130)
    query[:, 129] = -1.0
    state = fresh_state(Shape(tokens_q=130, tokens_k=2 * BLOCK_K, heads=1))
    IMPLEMENTATIONS[implementation](
        query,
        key,
        value,
        state.mask,
        None,
        torch.tensor([-4.0]),
        None,
        None,
        math.log(2),
        False,
        "running_max",
    )
    assert torch.equal(state.mask[0, 0, 0], block_bits(2, 1))
    assert torch.equal(state.mask[0, 0, 1], block_bits(2, 0, 1))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_tile_is_never_left_without_blocks(implementation: str) -> None:
    inputs = level_inputs([0.0, 0.0, 0.0])
    state = fresh_state(Shape(tokens_q=3, tokens_k=3 * BLOCK_K, heads=1))
    for _ in range(2):
        IMPLEMENTATIONS[implementation](
            *inputs, state.mask, state.lse, torch.tensor([-1.0]), None, None, 1.0, False, "mass"
        )
    assert torch.equal(state.mask.flatten(), block_bits(3, 2)), "the first one visited stays"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("remaining", ["none", "forbidden"])
def test_a_mask_that_leaves_nothing_visits_everything_allowed(implementation: str, remaining: str) -> None:
    inputs = level_inputs([0.0, 1.0, 2.0])
    state = fresh_state(Shape(tokens_q=3, tokens_k=3 * BLOCK_K, heads=1))
    state.mask.copy_(block_bits(3) if remaining == "none" else block_bits(3, 2))
    must_skip = block_bits(3, 2)
    _, lse = IMPLEMENTATIONS[implementation](
        *inputs, state.mask, None, torch.tensor([-9.0]), None, must_skip, math.log(2), False, "running_max"
    )
    torch.testing.assert_close(lse, torch.full((1, 1, 3), math.log(BLOCK_K * 3)))
    assert torch.equal(state.mask.flatten(), block_bits(3, 0, 1))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_skipped_blocks_are_not_read(implementation: str) -> None:
    shape = Shape()
    query, key, value = make_inputs(shape)
    state = fresh_state(shape)
    state.mask.copy_(block_bits(6, 0, 3, 5).expand_as(state.mask))
    key[:, BLOCK_K : 3 * BLOCK_K] = math.nan
    value[:, 4 * BLOCK_K : 5 * BLOCK_K] = math.nan
    out, lse = IMPLEMENTATIONS[implementation](
        query, key, value, state.mask, None, torch.tensor([-4.0]), None, None, 0.25, False, "running_max"
    )
    kept = torch.cat([torch.arange(BLOCK_K), torch.arange(3 * BLOCK_K, 4 * BLOCK_K), torch.arange(320, 330)])
    torch.testing.assert_close(out.double(), dense(query, key[:, kept], value[:, kept]), rtol=2e-5, atol=2e-5)
    assert lse.isfinite().all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rule", ALL_RULES)
def test_blocks_with_nan_are_kept(implementation: str, rule: Rule) -> None:
    query, key, value = level_inputs([math.nan, -20.0, 0.0])
    state = fresh_state(Shape(tokens_q=3, tokens_k=3 * BLOCK_K, heads=1))
    state.lse.zero_()
    IMPLEMENTATIONS[implementation](
        query, key, value, state.mask, state.lse, torch.tensor([-9.0]), None, None, math.log(2), False, rule
    )
    assert torch.equal(state.mask.flatten(), block_bits(3, 0, 2))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_blocks_whose_scores_are_all_minus_infinity_go(implementation: str) -> None:
    query, key, _ = level_inputs([0.0, -math.inf, -math.inf])
    state = fresh_state(Shape(tokens_q=3, tokens_k=3 * BLOCK_K, heads=1))
    IMPLEMENTATIONS[implementation](
        query,
        key,
        torch.ones_like(key),
        state.mask,
        None,
        torch.tensor([-9.0]),
        None,
        None,
        1.0,
        False,
        RULES[0],
    )
    assert torch.equal(state.mask.flatten(), block_bits(3, 0, 2)), "the first one visited stays"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_that_attend_nothing_have_no_say(implementation: str) -> None:
    """Of 128 queries the first 28 attend no key, and the last 36 also attend block 1."""
    query, key, value = level_inputs([0.0, -20.0], tokens_q=128)
    state = fresh_state(Shape(tokens_q=128, tokens_k=100, heads=1))
    for _ in range(2):
        IMPLEMENTATIONS[implementation](
            query,
            key[:, :100],
            value[:, :100],
            *state,
            torch.tensor([-9.0]),
            None,
            None,
            math.log(2),
            True,
            "mass",
        )
    assert torch.equal(state.mask.flatten(), block_bits(2, 0))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_mass_is_exact_far_below_the_maximum(implementation: str) -> None:
    """A share of 2**-300 underflows float32 but not its logarithm."""
    inputs = level_inputs([-300.0, 0.0])
    state = fresh_state(Shape(tokens_q=3, tokens_k=2 * BLOCK_K, heads=1))
    for threshold, kept in ((-301.0, (0, 1)), (-301.0, (0, 1)), (-299.0, (1,))):
        IMPLEMENTATIONS[implementation](
            *inputs, state.mask, state.lse, torch.tensor([threshold]), None, None, math.log(2), False, "mass"
        )
        assert torch.equal(state.mask.flatten(), block_bits(2, *kept))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rule", ALL_RULES)
def test_threshold_minus_infinity_is_dense_and_leaves_the_state(implementation: str, rule: Rule) -> None:
    shape = Shape()
    inputs = make_inputs(shape)
    state = fresh_state(shape)
    state.mask.copy_(block_bits(6, 1).expand_as(state.mask))
    state.lse.fill_(1.5)
    before = state.copy()
    out, _ = IMPLEMENTATIONS[implementation](
        *inputs, *state, torch.tensor([-math.inf]), block_bits(6, 2), block_bits(6, 3), 0.25, False, rule
    )
    torch.testing.assert_close(out.double(), dense(*inputs), rtol=2e-5, atol=2e-5)
    assert torch.equal(state.mask, before.mask)
    assert torch.equal(state.lse, before.lse)


@pytest.mark.parametrize("dtype", CPU_TOLERANCE)
@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize("name", SHAPES)
def test_steps_agree_with_the_reference(name: str, rule: Rule, dtype: torch.dtype) -> None:
    shape = SHAPES[name]
    state = fresh_state(shape)
    query, key, value = make_inputs(shape, dtype)
    for step in range(3):
        drift = 0.1 * torch.randn(query.shape, generator=torch.Generator().manual_seed(step))
        assert_step_agrees(((query + drift).to(dtype), key, value), state, [-5.0] * shape.batch, rule)


@pytest.mark.parametrize("rule", ALL_RULES)
def test_some_but_not_all_is_skipped(rule: Rule) -> None:
    """The other comparisons mean little unless steps like theirs clear some blocks."""
    shape = Shape(tokens_k=600)
    state = fresh_state(shape)
    for _ in range(3):
        assert_step_agrees(make_inputs(shape), state, [-5.0], rule)
    assert 0.2 < sparsity_of(state.mask, shape.tokens_k) < 0.9


@pytest.mark.parametrize("rule", ALL_RULES)
def test_each_sequence_has_its_own_threshold(rule: Rule) -> None:
    shape = Shape(batch=3)
    query, key, value = (tensor[:1].expand(3, -1, -1, -1) for tensor in make_inputs(shape))
    state = fresh_state(shape)
    for _ in range(2):
        assert_step_agrees((query, key, value), state, [-2.0, -9.0, -math.inf], rule)
    strict, loose, off = (sparsity_of(state.mask[row], shape.tokens_k) for row in range(3))
    assert strict > loose >= off == 0.0
    assert (state.lse[2] == math.inf).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("tokens_q", "tokens_k"),
    [(200, 200), (150, 330), (300, 100)],
    ids=["square", "longer keys", "longer queries"],
)
def test_causal_steps_agree_with_the_reference(rule: Rule, tokens_q: int, tokens_k: int) -> None:
    shape = Shape(tokens_q=tokens_q, tokens_k=tokens_k)
    state = fresh_state(shape)
    for _ in range(3):
        assert_step_agrees(make_inputs(shape), state, [-4.0], rule, causal=True)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rule", RULES)
def test_causal_leaves_bits_above_the_diagonal(implementation: str, rule: Rule) -> None:
    shape = Shape(tokens_q=256, tokens_k=256)
    state = fresh_state(shape)
    state.mask.copy_(block_bits(4, 0, 1, 3).expand_as(state.mask))
    IMPLEMENTATIONS[implementation](
        *make_inputs(shape), *state, torch.tensor([-4.0]), None, block_bits(4, 2, 3), 0.25, True, rule
    )
    assert unpack_bits(state.mask, 4)[:, :, 0, 2:].tolist() == [[[False, True]] * 2]
    assert not unpack_bits(state.mask, 4)[:, :, 1, 2:].any()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("causal", [False, True])
def test_forced_blocks_agree_with_the_reference(rule: Rule, causal: bool) -> None:
    shape = Shape(tokens_q=200, tokens_k=400)
    state = fresh_state(shape)
    state.mask.bitwise_and_(~block_bits(7, 1, 2, 5))
    for _ in range(3):
        assert_step_agrees(make_inputs(shape), state, [-3.0], rule, block_bits(7, 1, 4, 5), block_bits(7, 0, 5), causal)
    bits = unpack_bits(state.mask, 7)
    assert bits[..., [1, 4]].all()
    assert not bits[..., [0, 5]].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_everything_forbidden_gives_zeros(implementation: str) -> None:
    state = fresh_state(Shape(tokens_q=3, tokens_k=2 * BLOCK_K, heads=1))
    for _ in range(2):
        out, lse = IMPLEMENTATIONS[implementation](
            *level_inputs([0.0, 1.0]), *state, torch.tensor([-4.0]), None, all_blocks(2), 1.0, False, "mass"
        )
        assert not out.any()
        assert (lse == -math.inf).all()
        assert not state.mask.any()


@pytest.mark.parametrize("rule", ALL_RULES)
def test_non_contiguous_inputs(rule: Rule) -> None:
    shape = Shape(heads=4)
    query, key, value = make_inputs(shape)
    inputs = (
        query.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3),
        key.repeat_interleave(2, dim=3)[..., ::2],
        value.flip(1).contiguous().flip(1).expand(1, -1, -1, -1),
    )
    assert not inputs[0].is_contiguous()
    assert not inputs[1].is_contiguous()
    state = fresh_state(shape)
    for _ in range(2):
        assert_step_agrees(inputs, state, [-5.0], rule)


def test_bits_past_the_last_block_are_ignored_and_written_as_zero() -> None:
    shape = Shape()
    state, dirty = fresh_state(shape), fresh_state(shape)
    dirty.mask.fill_(-1)
    for after in (state, dirty):
        ops.forward(
            *make_inputs(shape),
            after.mask,
            None,
            torch.tensor([-5.0]),
            None,
            None,
            0.25,
            False,
            "running_max",
        )
    assert torch.equal(state.mask, dirty.mask)


@settings(max_examples=25, deadline=None)
@given(
    tokens_q=st.integers(1, 140),
    tokens_k=st.integers(1, 200),
    group=st.integers(1, 3),
    rule=st.sampled_from(RULES),
    causal=st.booleans(),
    threshold=st.floats(-12.0, -1.0),
    seed=st.integers(0, 2**16),
)
def test_any_shape_agrees_with_the_reference(
    tokens_q: int, tokens_k: int, group: int, rule: Rule, causal: bool, threshold: float, seed: int
) -> None:
    shape = Shape(tokens_q=tokens_q, tokens_k=tokens_k, heads=group, kv_heads=1)
    state = fresh_state(shape)
    for step in range(2):
        assert_step_agrees(make_inputs(shape, seed=seed + step), state, [threshold], rule, causal=causal)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), rule=st.sampled_from(ALL_RULES), threshold=st.floats(-8.0, -0.5))
def test_forced_blocks_hold_in_any_state(data: st.DataObject, rule: Rule, threshold: float) -> None:
    shape = Shape(tokens_q=130, tokens_k=5 * BLOCK_K - 3, heads=1, kv_heads=1)
    words = st.integers(0, 31).map(lambda word: torch.tensor([word], dtype=torch.int32))
    must_visit, must_skip = data.draw(words), data.draw(words)
    must_visit &= ~must_skip
    state = fresh_state(shape)
    state.mask.copy_(data.draw(words).expand_as(state.mask))
    for step in range(2):
        ops.forward(
            *make_inputs(shape, seed=step),
            *state,
            torch.tensor([threshold]),
            must_visit,
            must_skip,
            0.25,
            False,
            rule,
        )
        assert torch.equal(state.mask & must_visit, must_visit.expand_as(state.mask))
        assert not (state.mask & must_skip).any()
        assert state.mask.all() or must_skip.item() == 31


def ragged(inputs: Inputs) -> Inputs:
    """Without the last 20 keys."""
    query, key, value = inputs
    return (
        query,
        key[:, :-20].contiguous(),
        torch.randn(value[:, :-20].shape, generator=torch.Generator().manual_seed(0)),
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=25, deadline=None)
@given(
    words=st.integers(0, 31),
    visit=st.integers(0, 31),
    skip=st.integers(0, 30),
    levels=st.permutations([-3, -1, 0, 1, 2]),
)
def test_summaries_of_equal_keys_are_exact(
    implementation: str, words: int, visit: int, skip: int, levels: list[float]
) -> None:
    """Whatever is skipped; what must be is left out all the same."""
    inputs = query, key, value = ragged(level_inputs(levels, head_dim=4))
    state = fresh_state(Shape(tokens_q=3, tokens_k=key.shape[1], heads=1))
    mask, must_visit, must_skip = (torch.tensor([word], dtype=torch.int32) for word in (words, visit, skip))
    state.mask.copy_(mask.expand_as(state.mask))
    out, lse = IMPLEMENTATIONS[implementation](
        *inputs, *state, torch.tensor([-4.0]), must_visit, must_skip, 0.5, False, "mass_summaries"
    )
    remaining = ~unpack_bits(must_skip, 5).repeat_interleave(BLOCK_K)[: key.shape[1]]
    expected, expected_lse = reference.forward(
        query, key[:, remaining], value[:, remaining], None, None, None, None, None, 0.5, False, "mass_summaries"
    )
    torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(lse, expected_lse)
    assert torch.equal(state.lse, lse)
    assert not (state.mask & must_skip).any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_estimate_by_hand(implementation: str) -> None:
    """Half of the skipped block's 64 keys score 6 above their mean in natural units, half 6 below."""
    query, key, value = level_inputs([0.0, 0.0, 0.0], head_dim=2)
    key[0, BLOCK_K : 2 * BLOCK_K, 0, 0] = 1.0
    key[0, BLOCK_K : 2 * BLOCK_K, 0, 1] = torch.tensor([6.0, -6.0]).repeat(BLOCK_K // 2)
    value[0, BLOCK_K : 2 * BLOCK_K, 0] = torch.tensor([[2.0, 0.0], [0.0, 6.0]]).repeat(BLOCK_K // 2, 1)
    state = fresh_state(Shape(tokens_q=3, tokens_k=3 * BLOCK_K, heads=1))
    state.mask.copy_(block_bits(3, 0, 2))
    out, lse = IMPLEMENTATIONS[implementation](
        query, key, value, *state, torch.tensor([-4.0]), None, None, 1.0, False, "mass_summaries"
    )
    ratio = math.exp(1.0 + 8.0 * (math.sqrt(1 + 36.0 / 8.0) - 1))
    weight = ratio / (2.0 + ratio)
    torch.testing.assert_close(out, torch.tensor([1.0, 3.0]).expand(1, 3, 1, 2) * weight)
    torch.testing.assert_close(lse, torch.full((1, 1, 3), math.log(BLOCK_K * (2.0 + ratio))))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_block_comes_back_when_its_summary_says_so(implementation: str) -> None:
    state = fresh_state(Shape(tokens_q=3, tokens_k=4 * BLOCK_K, heads=1))
    arguments = (torch.tensor([-6.0]), None, block_bits(4, 3), math.log(2), False, "mass_summaries")
    # Its share of what there was a step before is 2**-9, 2**-8, 2 and 2**-0.6, from the second step on.
    for level, kept in ((-8.0, (0, 1, 2)), (-8.0, (0, 2)), (-7.0, (0, 2)), (2.0, (0, 1, 2)), (2.0, (0, 1, 2))):
        inputs = level_inputs([0.0, level, 0.0, 5.0])
        IMPLEMENTATIONS[implementation](*inputs, *state, *arguments)
        assert torch.equal(state.mask.flatten(), block_bits(4, *kept))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_row_brings_a_block_back(implementation: str) -> None:
    query, key, value = level_inputs([-9.0, 0.0], tokens_q=130)
    state = fresh_state(Shape(tokens_q=130, tokens_k=2 * BLOCK_K, heads=1))
    state.lse.fill_(math.log(BLOCK_K))
    state.mask.copy_(block_bits(2, 1).expand_as(state.mask))
    query[:, 129] = -1.0
    IMPLEMENTATIONS[implementation](
        query, key, value, *state, torch.tensor([-4.0]), None, None, math.log(2), False, "mass_summaries"
    )
    assert torch.equal(state.mask[0, 0, 0], block_bits(2, 1))
    assert torch.equal(state.mask[0, 0, 1], block_bits(2, 0, 1))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_without_a_step_before_every_summary_comes_back(implementation: str) -> None:
    state = fresh_state(Shape(tokens_q=3, tokens_k=3 * BLOCK_K, heads=1))
    state.mask.copy_(block_bits(3, 1))
    IMPLEMENTATIONS[implementation](
        *level_inputs([-99.0, 0.0, -99.0]), *state, torch.tensor([-1.0]), None, None, 1.0, False, "mass_summaries"
    )
    assert torch.equal(state.mask.flatten(), all_blocks(3))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_where_nothing_is_skipped_summaries_change_nothing(implementation: str) -> None:
    shape = Shape()
    with_summaries, without = fresh_state(shape), fresh_state(shape)
    for seed in range(2):
        arguments = (torch.tensor([-5.0]), None, None, 0.25, False)
        inputs = make_inputs(shape, seed=seed)
        with_summaries.mask.fill_(-1)
        without.mask.fill_(-1)
        forward = IMPLEMENTATIONS[implementation]
        results = forward(*inputs, *with_summaries, *arguments, "mass_summaries")
        expected = forward(*inputs, *without, *arguments, "mass")
        assert all(map(torch.equal, (*results, *with_summaries), (*expected, *without)))


@pytest.mark.parametrize("dtype", [torch.float64, *CPU_TOLERANCE])
def test_block_summaries(dtype: torch.dtype) -> None:
    _, key, value = make_inputs(Shape(batch=2, tokens_k=150), dtype)
    summaries = reference.summarize_blocks(key, value)
    for block, tokens in enumerate((slice(0, 64), slice(64, 128), slice(128, 150))):
        exact = key[:, tokens].double()
        expected = exact.mean(1), exact.var(1, unbiased=False), value[:, tokens].double().mean(1)
        for part, wanted in zip(summaries, expected, strict=True):
            assert part.dtype == dtype and part.shape == (2, 3, 2, 16)
            torch.testing.assert_close(part[:, block], wanted.to(dtype))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_variance_past_float16_does_no_harm(implementation: str) -> None:
    query, key, value = level_inputs([0.0, 0.0], head_dim=2, dtype=torch.float16)
    key[0, :BLOCK_K, 0, 0] = torch.tensor([6e4, -6e4]).repeat(BLOCK_K // 2)
    assert reference.summarize_blocks(key, value).variance[0, 0, 0, 0] == torch.finfo(torch.float16).max
    state = fresh_state(Shape(tokens_q=3, tokens_k=2 * BLOCK_K, heads=1))
    state.mask.copy_(block_bits(2, 1))
    for tensor in IMPLEMENTATIONS[implementation](
        query, key, value, *state, torch.tensor([-4.0]), None, None, 1.0, False, "mass_summaries"
    ):
        assert tensor.isfinite().all()


@settings(max_examples=25, deadline=None)
@given(data=st.data(), tokens_k=st.integers(1, 300), threshold=st.floats(-12.0, -1.0), seed=st.integers(0, 2**16))
def test_summaries_agree_with_the_reference_from_any_mask(
    data: st.DataObject, tokens_k: int, threshold: float, seed: int
) -> None:
    shape = Shape(tokens_q=130, tokens_k=tokens_k, heads=2, kv_heads=1)
    word = st.integers(0, 31).map(lambda bits: torch.tensor([bits], dtype=torch.int32))
    state = fresh_state(shape)
    for step in range(2):
        state.mask[:, :, 0] = data.draw(word)
        forced = data.draw(word), data.draw(word)
        assert_step_agrees(make_inputs(shape, seed=seed + step), state, [threshold], "mass_summaries", *forced)


@pytest.mark.parametrize("tracked", ["dense", "running_max", "mass", "mass_summaries", "forced"])
def test_operator_is_registered_correctly(tracked: str) -> None:
    shape = Shape(tokens_q=130, tokens_k=70, heads=2, kv_heads=1)
    state = fresh_state(shape)
    threshold = torch.tensor([-4.0])
    word = block_bits(2, 0)
    optional: dict[str, tuple[Tensor | None, ...]] = {
        "dense": (None, None, None, None, None),
        "running_max": (state.mask, None, threshold, None, None),
        "mass": (state.mask, state.lse, threshold, None, None),
        "mass_summaries": (state.mask, state.lse, threshold, None, None),
        "forced": (state.mask, state.lse, threshold, word, word),
    }
    rule = tracked if tracked in ALL_RULES else "mass"
    torch.library.opcheck(
        torch.ops.lite_attention.forward.default,
        (*make_inputs(shape), *optional[tracked], 0.25, False, rule),
        {"pairs_visited": torch.zeros((), dtype=torch.int64)} if tracked == "forced" else {},
    )


def test_only_a_mask_says_what_is_visited() -> None:
    inputs, pairs = make_inputs(Shape()), torch.zeros((), dtype=torch.int64)
    with pytest.raises(ValueError, match="pairs_visited: expected None without a mask, got a tensor"):
        ops.forward(*inputs, None, None, None, None, None, 0.25, False, "mass", pairs_visited=pairs)


VALID = {
    "query": torch.zeros(2, 130, 4, 8),
    "key": torch.zeros(2, 70, 2, 8),
    "value": torch.zeros(2, 70, 2, 8),
    "mask": torch.ones(2, 4, 2, 1, dtype=torch.int32),
    "lse_state": torch.zeros(2, 4, 130),
    "thresholds": torch.zeros(2),
    "must_visit": torch.zeros(1, dtype=torch.int32),
    "must_skip": torch.zeros(1, dtype=torch.int32),
    "scale": 1.0,
    "causal": False,
    "rule": "mass",
    "pairs_visited": torch.zeros((), dtype=torch.int64),
}


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        (
            "query",
            torch.zeros(2, 130, 8),
            ValueError,
            r"query: expected \(batch, tokens, heads, head_dim\), got",
        ),
        (
            "query",
            torch.zeros(2, 130, 4, 8).double(),
            TypeError,
            "query: expected float32, .* got torch.float64",
        ),
        ("query", torch.zeros(2, 130, 3, 8), ValueError, "key: expected kv_heads that divide 3 heads, got 2"),
        ("key", torch.zeros(3, 70, 2, 8), ValueError, r"key: expected \(2, tokens, kv_heads, 8\), got"),
        ("key", torch.zeros(2, 70, 2, 9), ValueError, r"key: expected .* got shape \(2, 70, 2, 9\)"),
        ("key", torch.zeros(2, 70, 0, 8), ValueError, "key: expected kv_heads that divide 4 heads, got 0"),
        ("key", torch.zeros(2, 70, 2, 8).half(), TypeError, "key: expected torch.float32, got torch.float16"),
        ("value", torch.zeros(2, 71, 2, 8), ValueError, r"value: expected shape \(2, 70, 2, 8\), got"),
        (
            "value",
            torch.zeros(2, 70, 2, 8).half(),
            TypeError,
            "value: expected torch.float32, got torch.float16",
        ),
        (
            "mask",
            torch.ones(2, 4, 1, 1, dtype=torch.int32),
            ValueError,
            r"mask: expected shape \(2, 4, 2, 1\)",
        ),
        ("mask", torch.ones(2, 4, 2, 1), TypeError, "mask: expected torch.int32, got torch.float32"),
        ("mask", None, ValueError, "lse_state: expected None without a mask"),
        ("lse_state", torch.zeros(2, 130, 4), ValueError, r"lse_state: expected shape \(2, 4, 130\)"),
        ("lse_state", None, ValueError, "lse_state: expected a tensor with rule 'mass', got None"),
        ("thresholds", torch.zeros(1), ValueError, r"thresholds: expected shape \(2,\), got \(1,\)"),
        ("thresholds", torch.zeros(2).double(), TypeError, "thresholds: expected torch.float32, got"),
        ("thresholds", None, ValueError, "thresholds: expected a tensor beside a mask, got None"),
        ("must_visit", torch.zeros(2, dtype=torch.int32), ValueError, r"must_visit: expected shape \(1,\)"),
        ("must_skip", torch.zeros(1), TypeError, "must_skip: expected torch.int32, got torch.float32"),
        ("rule", "mass_summaries", ValueError, "causal: expected False with rule 'mass_summaries', got True"),
        ("rule", "max", ValueError, "rule: expected 'running_max', 'mass' or 'mass_summaries', got 'max'"),
        ("thresholds", torch.zeros(2, device="meta"), ValueError, "thresholds: expected a tensor on"),
        ("pairs_visited", torch.zeros(1, dtype=torch.int64), ValueError, r"pairs_visited: expected shape \(\), got"),
        ("pairs_visited", torch.zeros(()), TypeError, "pairs_visited: expected torch.int64, got torch.float32"),
    ],
)
def test_errors_name_the_argument(name: str, value: object, error: type[Exception], message: str) -> None:
    arguments = VALID | {name: value, "causal": value == "mass_summaries"}
    with pytest.raises(error, match=message):
        torch.ops.lite_attention.forward(**arguments)
