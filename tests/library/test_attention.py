"""LiteAttention, SeqParallelLiteAttention and merge_attention as users call them."""

import copy
import logging
import math
import re
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lite_attention import LiteAttention, SeqParallelLiteAttention, attention, merge_attention, ops, reference
from lite_attention.attention import Threshold, from_relative
from lite_attention.ranges import all_blocks, unpack_bits
from lite_attention.tiles import BLOCK_K
from tests.library.forward_cases import ALL_RULES

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
LEVELS = torch.tensor([-4.0, -8.0, 6.0, -6.0, 0.0, -5.0])
"""Weight of each key block, natural log."""


def make_inputs(
    batch: int = 1, tokens_q: int = 200, heads: int = 2, kv_heads: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and 6 blocks of keys (the last ragged) with weights of about ``LEVELS``."""
    random = torch.Generator().manual_seed(1)
    tokens_k = 6 * BLOCK_K - 9
    query = 0.3 * torch.randn(batch, tokens_q, heads, 16, generator=random) + 1.0
    key = 0.3 * torch.randn(batch, tokens_k, kv_heads, 16, generator=random)
    key = key + LEVELS.repeat_interleave(BLOCK_K)[:tokens_k, None, None] / 4
    value = torch.randn(batch, tokens_k, kv_heads, 16, generator=random)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def dense(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    q, k, v = (tensor.double().transpose(1, 2) for tensor in (query, key, value))
    return scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True).transpose(1, 2)


def sparsity(attn: LiteAttention | SeqParallelLiteAttention) -> float:
    assert attn.sparsity is not None
    return attn.sparsity


def visited_blocks(attn: LiteAttention) -> list[int]:
    """Blocks that some tile visits next."""
    assert attn.skip_state is not None
    bits = unpack_bits(attn.skip_state.mask, attn.skip_state.blocks)
    return bits.flatten(0, 2).any(0).nonzero().flatten().tolist()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2)])
def test_first_step_is_dense_and_later_ones_near_it(dtype: torch.dtype, heads: int, kv_heads: int) -> None:
    inputs = make_inputs(batch=2, heads=heads, kv_heads=kv_heads, dtype=dtype)
    attn = LiteAttention(threshold=-6.0)
    assert attn.sparsity is None
    assert attn.skip_state is None
    first = attn(*inputs)
    assert first.shape == inputs[0].shape
    assert first.dtype == dtype
    assert sparsity(attn) == 0.0
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(first.double(), dense(*inputs), rtol=tolerance, atol=tolerance)
    second = attn(*inputs)
    assert 0.3 < sparsity(attn) < 0.9
    torch.testing.assert_close(second.double(), dense(*inputs), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("rule", ALL_RULES)
def test_steps_equal_the_reference(rule: reference.Rule) -> None:
    query, key, value = make_inputs(batch=2)
    attn = LiteAttention(-5.0, rule=rule)
    mask, lse_state = all_blocks(6).repeat(2, 2, 2, 1), torch.full((2, 2, 200), math.inf)
    for _ in range(3):
        before = mask.clone()
        out, lse = attn(query, key, value, return_softmax_lse=True)
        out_expected, lse_expected = reference.forward(
            query, key, value, mask, lse_state, torch.tensor([-5.0, -5.0]), None, None, 0.25, False, rule
        )
        torch.testing.assert_close(out, out_expected, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(lse, lse_expected)
        assert attn.skip_state is not None
        assert torch.equal(attn.skip_state.mask, mask)
        assert sparsity(attn) == pytest.approx(1.0 - unpack_bits(before, 6).double().mean().item())
    assert sparsity(attn) > 0.2


def test_fourth_positional_argument_is_the_scale() -> None:
    inputs = make_inputs()
    attn = LiteAttention(-math.inf)
    torch.testing.assert_close(attn(*inputs, 0.5).double(), dense(*inputs, scale=0.5), rtol=2e-5, atol=2e-5)
    assert torch.equal(attn(*inputs), attn(*inputs, 0.25))


@pytest.mark.parametrize("off", ["disabled at construction", "disabled later", "threshold"])
def test_not_skipping_leaves_the_state(off: str) -> None:
    inputs = make_inputs()
    attn = LiteAttention(-5.0)
    if off == "disabled at construction":
        attn = LiteAttention(-5.0, enable_skipping=False)
        attn(*inputs)
        assert attn.skip_state is None
        attn.enable_skip_optimization()
    attn(*inputs)
    assert attn.skip_state is not None
    before = attn.skip_state.mask.clone()
    if off == "threshold":
        attn.set_threshold(-math.inf)
    else:
        attn.enable_skip_optimization(enable=False)
    out = attn(*inputs)
    torch.testing.assert_close(out.double(), dense(*inputs), rtol=2e-5, atol=2e-5)
    assert sparsity(attn) == 0.0
    assert torch.equal(attn.skip_state.mask, before)
    attn.enable_skip_optimization()
    attn.set_threshold(-5.0)
    attn(*inputs)
    assert sparsity(attn) > 0.0, "the state goes on where it was"


def test_reset_starts_anew() -> None:
    inputs = make_inputs()
    attn = LiteAttention(-5.0)
    attn(*inputs)
    attn.reset_skip_state()
    assert attn.sparsity is None
    assert visited_blocks(attn) == [0, 1, 2, 3, 4, 5]
    attn(*inputs)
    assert sparsity(attn) == 0.0


def test_new_shape_starts_a_new_state_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    attn = LiteAttention(-5.0)
    query, key, value = make_inputs()
    half = tuple(tensor.half() for tensor in (query, key, value))
    with caplog.at_level(logging.DEBUG, logger="lite_attention"):
        for inputs in (
            (query, key, value),
            (query[:, :100], key, value),
            (query, key[:, :99], value[:, :99]),
            half,
        ):
            attn(*inputs)
            assert sparsity(attn) == 0.0
            attn(*inputs)
    assert len(caplog.records) == 4
    assert all(record.levelno == logging.DEBUG for record in caplog.records)
    assert "new skip state: batch 1, heads 2, queries 100, keys 375, torch.float32 on cpu" in caplog.messages[1]


def test_each_sequence_has_its_own_state_and_threshold() -> None:
    query, key, value = (tensor.expand(3, -1, -1, -1) for tensor in make_inputs())
    attn = LiteAttention()
    attn.set_threshold([2, -9.0, -math.inf])
    for _ in range(2):
        out = attn(query, key, value)
    assert attn.skip_state is not None
    strict, loose, off = (attn.skip_state.sparsity(slot) for slot in range(3))
    assert strict > loose > off == 0.0
    assert sparsity(attn) == pytest.approx((strict + loose) / 3)
    torch.testing.assert_close(out[2:].double(), dense(query[2:], key[2:], value[2:]), rtol=2e-5, atol=2e-5)
    alone = LiteAttention(-2.0)
    for _ in range(2):
        out_alone = alone(query[:1], key[:1], value[:1])
    torch.testing.assert_close(out[:1], out_alone)


def test_threshold_of_another_batch() -> None:
    attn = LiteAttention(torch.tensor([-1.0, -2.0]))
    with pytest.raises(ValueError, match="threshold: expected one for each of 1 sequences, got 2"):
        attn(*make_inputs())


def test_refresh_visits_everything_every_few_steps() -> None:
    inputs = make_inputs()
    attn = LiteAttention(-5.0, refresh_interval=3)
    dense_steps = []
    for step in range(7):
        attn(*inputs)
        if sparsity(attn) == 0.0:
            dense_steps.append(step)
    assert dense_steps == [0, 3, 6]


def test_thresholds_by_step() -> None:
    inputs = make_inputs()
    attn, other = LiteAttention({5: -math.inf, 1: -20, 3: 5.0}), LiteAttention(-math.inf)
    for _video in range(2):
        for step in range(7):
            other.set_threshold({0: -math.inf, 1: -20.0, 2: -20.0, 3: -5.0, 4: -5.0, 5: -math.inf, 6: -math.inf}[step])
            assert torch.equal(attn(*inputs), other(*inputs))
            assert sparsity(attn) == sparsity(other)
            assert (sparsity(attn) > 0) == (step == 4)
        attn.reset_skip_state()
        other.reset_skip_state()


def test_steps_may_be_left_out_and_begin_anew_with_another_shape() -> None:
    inputs = make_inputs()
    attn = LiteAttention({2: -5.0})
    for step in (1, 2, 3):
        attn.step = step
        attn(*inputs)
    assert sparsity(attn) > 0
    attn(*make_inputs(tokens_q=150))
    assert (sparsity(attn), attn.step) == (0.0, 1)
    attn(*make_inputs(tokens_q=150))
    assert sparsity(attn) == 0.0
    attn(*make_inputs(tokens_q=150))
    assert sparsity(attn) > 0  # step 2, what step 1 of the new state cleared


@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize("threshold", [{3: -5.0}, {0: -math.inf, 3: -5.0}], ids=["left out", "dense"])
def test_the_first_step_of_a_schedule_skips(rule: reference.Rule, threshold: Threshold) -> None:
    inputs = make_inputs()
    by_schedule, by_hand = LiteAttention(threshold, rule=rule), LiteAttention(-5.0, rule=rule)
    for step in range(6):
        by_hand.enable_skip_optimization(step > 0)
        assert torch.equal(by_schedule(*inputs), by_hand(*inputs, visit_all=step < 3))
        assert sparsity(by_schedule) == sparsity(by_hand)
        assert (sparsity(by_schedule) > 0) == (step >= 3)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(ALL_RULES),
    st.lists(st.sampled_from(["dense", "learn", "skip"]), min_size=1, max_size=6),
    st.integers(0, 3),
    st.integers(0, 2**16),
)
def test_whatever_steps_learn_the_state_is_that_of_the_reference(
    rule: reference.Rule, phases: list[str], refresh: int, seed: int
) -> None:
    attn = LiteAttention(-5.0, rule=rule, refresh_interval=refresh)
    mask, lse_state = all_blocks(6).repeat(1, 2, 2, 1), torch.full((1, 2, 200), math.inf)
    since_all_were_visited = 0
    random = torch.Generator().manual_seed(seed)
    for phase in phases:
        query, key, value = make_inputs()
        query = query * (0.5 + torch.rand(1, 200, 2, 1, generator=random))
        attn.enable_skip_optimization(phase != "dense")
        out, lse = attn(query, key, value, return_softmax_lse=True, visit_all=phase == "learn")
        if phase == "dense":
            assert sparsity(attn) == 0.0
            torch.testing.assert_close(out.double(), dense(query, key, value), rtol=2e-5, atol=2e-5)
            continue
        if phase == "learn" or (refresh and since_all_were_visited % refresh == 0):
            mask.copy_(all_blocks(6))
            since_all_were_visited = 0
        since_all_were_visited += 1
        pairs = torch.zeros((), dtype=torch.int64)
        expected = reference.forward(
            query, key, value, mask, lse_state, torch.tensor([-5.0]), None, None, 0.25, False, rule, pairs_visited=pairs
        )
        torch.testing.assert_close(out, expected[0], rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(lse, expected[1])
        assert attn.skip_state is not None and torch.equal(attn.skip_state.mask, mask)
        assert sparsity(attn) == pytest.approx(1 - int(pairs) / attn.skip_state.pairs)


@pytest.mark.parametrize("rule", ALL_RULES)
def test_dense_heads_visit_everything_and_the_others_do_not_notice(rule: reference.Rule) -> None:
    query, key, value = make_inputs(heads=4)
    attn, all_skip = LiteAttention(-5.0, rule=rule, dense_heads=[3, 1, 3]), LiteAttention(-5.0, rule=rule)
    for _ in range(4):
        out, skipped = attn(query, key, value), all_skip(query, key, value)
    assert torch.equal(out[:, :, 0::2], skipped[:, :, 0::2])
    torch.testing.assert_close(out[:, :, 1::2], dense(query, key, value)[:, :, 1::2].float(), rtol=0, atol=1e-5)
    assert sparsity(attn) == pytest.approx(sparsity(all_skip) / 2)
    with pytest.raises(ValueError, match="dense_heads: expected heads below 2, as the query has, got 3"):
        attn(*make_inputs(heads=2))


@given(st.floats(-30, 8) | st.just(-math.inf), st.integers(0, 200_000))
def test_relative_thresholds_count_from_the_share_of_a_block_in_a_uniform_softmax(threshold: float, keys: int) -> None:
    blocks = max(1, math.ceil(keys / BLOCK_K))
    number = from_relative(threshold, keys)
    assert 2**number == pytest.approx(min(2**threshold / blocks, 1.0), rel=1e-9, abs=0.0)
    rows = from_relative(torch.tensor([threshold, -math.inf]), keys)
    assert rows.dtype == torch.float32
    assert rows.tolist() == pytest.approx([number, -math.inf], rel=1e-6, abs=1e-6)
    assert from_relative(threshold, 2 * BLOCK_K * blocks) == pytest.approx(min(threshold - math.log2(2 * blocks), 0.0))


def test_relative_threshold_that_is_documented() -> None:
    assert from_relative(-1.0, 12_544) == pytest.approx(-8.6, abs=0.05)


@pytest.mark.parametrize("rule", ["mass", "mass_summaries"])
@pytest.mark.parametrize("threshold", [-1.0, [-0.5, -3.0], [-1.0, -math.inf], {0: -3.0, 2: -0.5}], ids=str)
def test_relative_thresholds_equal_absolute_ones_at_every_length(rule: reference.Rule, threshold: Threshold) -> None:
    def absolute(number: float) -> float:
        return number - math.log2(blocks)

    query, key, value = make_inputs(batch=2)
    relative = LiteAttention(threshold, rule=rule, relative=True)
    for blocks in (6, 3):
        keys = blocks * BLOCK_K - 9
        same: Threshold
        if isinstance(threshold, dict):
            same = {step: absolute(number) for step, number in threshold.items()}
        else:
            same = [absolute(number) for number in threshold] if isinstance(threshold, list) else absolute(threshold)
        other = LiteAttention(same, rule=rule)
        for _ in range(4):
            assert torch.equal(
                relative(query, key[:, :keys], value[:, :keys]), other(query, key[:, :keys], value[:, :keys])
            )
            assert relative.sparsity == other.sparsity
        assert sparsity(other) > 0


def test_cleared_blocks_stay_cleared_without_refresh() -> None:
    query, key, value = make_inputs()
    attn = LiteAttention(-5.0)
    attn(query, key, value)
    cleared = visited_blocks(attn)
    attn(query, -key, value)
    assert set(visited_blocks(attn)) <= set(cleared)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rule", ALL_RULES)
@pytest.mark.parametrize("threshold", [-0.1, -0.5, -1.0, -2.0, -4.0, -7.0, -10.0, -15.0, -30.0])
@pytest.mark.parametrize(
    ("warmup", "refresh", "ranges"),
    [
        (0, 0, {}),
        (2, 0, {}),
        (0, 3, {}),
        (0, 0, {"must_visit": [(70, 100)]}),
        (0, 0, {"must_skip": [(64, 375)]}),
        (1, 2, {"must_visit": [(300, 375)], "must_skip": [(0, 128)]}),
    ],
    ids=["alone", "warm-up", "refresh", "must_visit", "must_skip", "all"],
)
def test_no_setting_leaves_the_range_of_the_values(
    threshold: float, rule: reference.Rule, warmup: int, refresh: int, ranges: dict[str, Any], dtype: torch.dtype
) -> None:
    # Whatever is skipped, every output is a mean of some values; nothing to visit would be NaN or 0.
    attn = LiteAttention(threshold, rule=rule, refresh_interval=refresh)
    random = torch.Generator().manual_seed(7)
    for step in range(8):
        attn.enable_skip_optimization(step >= warmup)
        query, key, _ = make_inputs(dtype=dtype)
        # What mattered matters no more: queries look elsewhere at each step, and ever more sharply.
        query = query * (step + 1) * (1 if step % 2 else -1)
        value = 2.0 + torch.rand(key.shape, generator=random).to(dtype)
        out, lse = attn(query, key, value, return_softmax_lse=True, **ranges)
        assert lse.isfinite().all()
        low, high = value.amin(1, keepdim=True), value.amax(1, keepdim=True)
        assert ((out >= low - 0.02) & (out <= high + 0.02)).all()
        assert attn.skip_state is None or bool((attn.skip_state.mask != 0).any(-1).all())
    assert refresh or sparsity(attn) > 0.1, "something was skipped"


def test_must_visit_and_must_skip() -> None:
    inputs = make_inputs()
    attn = LiteAttention(-2.0)
    for _ in range(3):
        attn(*inputs, must_visit=[(70, 71), (330, 340)], must_skip=[(120, 200)])
    assert visited_blocks(attn) == [1, 4, 5]
    assert sparsity(attn) == pytest.approx(3 / 6)


def test_must_skip_is_as_if_the_keys_were_not_there() -> None:
    query, key, value = make_inputs()
    out = LiteAttention(-100.0)(query, key, value, must_skip=[(128, 192)])
    kept = torch.cat([torch.arange(128), torch.arange(192, key.shape[1])])
    torch.testing.assert_close(out.double(), dense(query, key[:, kept], value[:, kept]), rtol=2e-5, atol=2e-5)


def test_must_visit_brings_cleared_blocks_back() -> None:
    inputs = make_inputs()
    attn = LiteAttention(-5.0)
    attn(*inputs)
    assert 1 not in visited_blocks(attn)
    out = attn(*inputs, must_visit=[(0, 375)])
    assert sparsity(attn) == 0.0
    torch.testing.assert_close(out.double(), dense(*inputs), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("order", [-1, 1], ids=["descending", "ascending"])
def test_published_lists_mean_the_same_as_ranges(order: int) -> None:
    inputs = make_inputs()
    published, ranges = LiteAttention(-2.0), LiteAttention(-2.0)
    for _ in range(2):
        out = published(*inputs, must_do_list=[70, 71, 330, 340][::order], must_skip_list=[120, 200][::order])
        expected = ranges(*inputs, must_visit=[(70, 71), (330, 340)], must_skip=[(120, 200)])
        assert torch.equal(out, expected)
    assert visited_blocks(published) == visited_blocks(ranges)


def test_published_list_over_the_whole_sequence() -> None:
    inputs = make_inputs()
    attn = LiteAttention(-2.0)
    for _ in range(2):
        attn(*inputs, must_do_list=[374, 0])
    assert sparsity(attn) == 0.0


def test_published_calls_keep_working() -> None:
    inputs = make_inputs(batch=3)
    attn = LiteAttention(
        enable_skipping=True, threshold=-10.0, max_batch_size=2, reverse_skip_list=True, use_int8=False
    )
    out, lse = attn(*inputs, scale=0.25, return_softmax_lse=True, must_do_list=None, must_skip_list=None)
    assert out.shape == (3, 200, 2, 16)
    assert lse.shape == (3, 2, 200)
    assert lse.dtype == torch.float32
    attn.set_threshold(threshold=-6.0)
    attn.enable_skip_optimization(enable=False)
    attn.reset_skip_state()
    assert LiteAttention(-6.0).threshold == LiteAttention(6).threshold == -6.0
    assert LiteAttention().threshold == -10.0


def test_threshold_can_be_set_later() -> None:
    attn = LiteAttention(threshold=None)
    with pytest.raises(RuntimeError, match="no threshold: expected set_threshold"):
        attn(*make_inputs())
    attn.set_threshold(threshold=10)
    assert attn.threshold == -10.0
    attn(*make_inputs())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"threshold": math.nan}, ValueError, "threshold: expected a finite number or -inf, got nan"),
        ({"threshold": "-6"}, TypeError, "threshold: expected a number, got str '-6'"),
        ({"threshold": True}, TypeError, "threshold: expected a number, got bool True"),
        ({"threshold": [-1.0, math.inf]}, ValueError, "threshold: expected a finite number or -inf, got inf"),
        ({"threshold": torch.tensor(-1.0)}, ValueError, "threshold: expected a number or shape .batch,."),
        ({"threshold": torch.ones(1, 1)}, ValueError, r"or shape \(batch,\), got shape \(1, 1\)"),
        ({"threshold": {}}, ValueError, "threshold: expected a threshold for at least one step, got none"),
        ({"threshold": {-1: -6}}, ValueError, "threshold: expected steps from 0 on, got -1"),
        ({"threshold": {"0": -6}}, TypeError, "threshold: expected ints as steps, got str '0'"),
        ({"threshold": {3: math.nan}}, ValueError, r"threshold\[3\]: expected a finite number or -inf, got nan"),
        ({"dense_heads": [-1]}, ValueError, "dense_heads: expected heads from 0 on, got -1"),
        ({"dense_heads": [1.0]}, TypeError, "dense_heads: expected ints, got float 1.0"),
        ({"rule": "max"}, ValueError, "rule: expected 'running_max', 'mass' or 'mass_summaries', got 'max'"),
        ({"relative": True}, ValueError, "relative: expected False with the rule 'running_max', .*, got True"),
        ({"relative": 1, "rule": "mass"}, TypeError, "relative: expected a bool, got int 1"),
        ({"refresh_interval": -1}, ValueError, "refresh_interval: expected 0 .never. or more steps, got -1"),
        ({"use_int8": True}, ValueError, "use_int8: expected False .int8 is not supported., got True"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LiteAttention(**options)
    with pytest.raises(error, match=message):
        SeqParallelLiteAttention(2, **options)


@pytest.mark.parametrize(
    ("ranges", "error", "message"),
    [
        ({"must_visit": [(0, 376)]}, ValueError, "must_visit: expected 0 <= start < end <= 375 tokens"),
        ({"must_skip": [(5, 5)]}, ValueError, "must_skip: expected 0 <= start < end"),
        ({"must_skip": [(0.0, 5)]}, TypeError, "must_skip: expected an int, got float"),
        ({"must_skip": [(0, 200), (200, 375)]}, ValueError, "must_skip: expected some of 375 tokens left"),
        ({"must_visit": [(0, 9)], "must_skip": [(8, 99)]}, ValueError, "must_skip: expected no overlap"),
        ({"must_do_list": [1, 2, 3]}, ValueError, "must_do_list: expected pairs"),
        ({"must_skip_list": [9, 5, 7, 3]}, ValueError, "must_skip_list: expected strictly"),
        (
            {"must_do_list": [9, 5], "must_visit": []},
            ValueError,
            "must_do_list: expected None beside must_visit",
        ),
    ],
)
def test_bad_ranges(ranges: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LiteAttention()(*make_inputs(), **ranges)


def test_bad_tensors_are_refused_and_leave_no_state() -> None:
    query, key, value = make_inputs()
    attn = LiteAttention()
    with pytest.raises(TypeError, match=r"query: expected float32, bfloat16 or float16, got torch.float64"):
        attn(query.double(), key, value)
    with pytest.raises(ValueError, match=re.escape("value: expected shape (1, 375, 2, 16), got (1, 9, 2, 16)")):
        attn(query, key, value[:, :9])
    assert attn.skip_state is None


def test_gradients_are_refused() -> None:
    query, key, value = make_inputs()
    attn = LiteAttention()
    key.requires_grad_()
    with pytest.raises(RuntimeError, match="for inference only"):
        attn(query, key, value)
    with torch.no_grad():
        attn(query, key, value)


def test_state_made_in_inference_mode_lives_on_outside() -> None:
    inputs = make_inputs()
    attn = LiteAttention(-5.0, rule="mass", refresh_interval=2)
    with torch.inference_mode():
        attn(*inputs)
    for _ in range(3):
        attn(*inputs)
    attn.reset_skip_state()
    with torch.inference_mode():
        attn(*inputs)


@pytest.mark.parametrize(("tokens_q", "tokens_k"), [(0, 10), (10, 0), (1, 1), (0, 0)])
def test_tiny_sequences(tokens_q: int, tokens_k: int) -> None:
    attn = LiteAttention(-5.0, rule="mass")
    for _ in range(2):
        out = attn(torch.ones(2, tokens_q, 2, 4), torch.ones(2, tokens_k, 2, 4), torch.ones(2, tokens_k, 2, 4))
        assert torch.equal(out, torch.full((2, tokens_q, 2, 4), 1.0 if tokens_k else 0.0))
        assert sparsity(attn) == 0.0


def test_default_dtype_and_device_do_not_matter() -> None:
    """Pipelines run under other defaults than those that the state needs."""
    inputs = make_inputs()
    attn = LiteAttention([-5.0], rule="mass")
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            for threshold in ([-5.0], -5.0, torch.tensor([-5.0], device="cpu")):
                attn.set_threshold(threshold)
                attn(*inputs, must_visit=[(0, 64)], must_skip=[(64, 128)])
    finally:
        torch.set_default_dtype(torch.float32)
    assert attn.skip_state is not None
    assert attn.skip_state.mask.device == inputs[0].device
    assert sparsity(attn) > 0.2


def test_state_is_no_part_of_the_state_dict() -> None:
    attn = LiteAttention(-5.0)
    attn(*make_inputs())
    assert not attn.state_dict()
    assert not SeqParallelLiteAttention(2).state_dict()


def test_a_copy_has_its_own_state() -> None:
    inputs = make_inputs()
    attn = LiteAttention(-5.0)
    attn(*inputs)
    twin = copy.deepcopy(attn)
    twin.reset_skip_state()
    attn(*inputs)
    assert sparsity(attn) > 0.0
    assert visited_blocks(twin) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("rule", ALL_RULES)
def test_compiled_model_gives_the_same_steps(rule: reference.Rule) -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = LiteAttention(-5.0, rule=rule, refresh_interval=4)

        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return self.attn(query * 1.0, key, value + 0.5) * 2.0

    eager, layer = Layer(), Layer()
    compiled = torch.compile(layer, backend="aot_eager")
    inputs = make_inputs()
    with torch.no_grad():
        for _ in range(6):
            torch.testing.assert_close(compiled(*inputs), eager(*inputs))
            assert layer.attn.sparsity == eager.attn.sparsity


def test_operator_compiles_without_graph_breaks() -> None:
    def step(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, threshold: Tensor) -> Tensor:
        out, lse = ops.forward(query, key, value, mask, None, threshold, None, None, 0.25, False, "running_max")
        return out + lse.sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    inputs, threshold = make_inputs(), torch.tensor([-5.0])
    mask, mask_compiled = (all_blocks(6).repeat(1, 2, 2, 1) for _ in range(2))
    for _ in range(2):
        torch.testing.assert_close(compiled(*inputs, mask_compiled, threshold), step(*inputs, mask, threshold))
        assert torch.equal(mask, mask_compiled)
    assert not torch.equal(mask, all_blocks(6).expand_as(mask))


def test_device_without_implementation_is_dense_and_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(heads=4)
    monkeypatch.setattr(ops, "unsupported", lambda operator, query: f"{operator} cannot run: it is Monday")
    attention._warn_dense.cache_clear()
    attn = LiteAttention(-2.0)
    with pytest.warns(UserWarning, match="forward cannot run: it is Monday; attention is dense"):
        out, lse = attn(*inputs, return_softmax_lse=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(attn(*inputs), out)
    assert sparsity(attn) == 0.0
    assert attn.skip_state is None
    monkeypatch.undo()
    out_expected, lse_expected = LiteAttention(-math.inf)(*inputs, return_softmax_lse=True)
    torch.testing.assert_close(out, out_expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(lse, lse_expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [20, 320])
def test_cpu_supports_every_query(head_dim: int, dtype: torch.dtype) -> None:
    assert ops.unsupported("forward", torch.empty(1, 1, 1, head_dim, dtype=dtype)) is None


def test_unimplemented_names_devices() -> None:
    assert ops.unimplemented("forward", "cuda") is None
    assert ops.unimplemented("forward", "xpu") == "lite_attention::forward has no implementation for xpu"
    assert ops.unimplemented("decode", "xpu") == "lite_attention::decode has no implementation for xpu"


def test_sequence_parallel_splits_merge_to_the_whole() -> None:
    query, key, value = make_inputs(batch=2)
    attn = SeqParallelLiteAttention(num_nodes=3, threshold=-100.0)
    for _ in range(2):
        parts = [attn(query, key[:, i : i + 125], value[:, i : i + 125], i // 125) for i in (0, 125, 250)]
        out, lse = merge_attention(*zip(*parts, strict=True))
        expected, lse_expected = LiteAttention(-math.inf)(query, key, value, return_softmax_lse=True)
        torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(lse, lse_expected)


def test_sequence_parallel_splits_merge_with_what_summaries_stand_for() -> None:
    """Keys of a block are equal, so its summary is exact whatever is skipped, and so are the splits' log-sum-exps."""
    query, key, value = make_inputs(batch=2)
    key = torch.cat([block[:, :1].expand_as(block) for block in key.split(BLOCK_K, 1)], 1)
    attn = SeqParallelLiteAttention(num_nodes=2, threshold=-5.0, rule="mass_summaries")
    half = 3 * BLOCK_K
    for _ in range(4):
        parts = [attn(query, key[:, i : i + half], value[:, i : i + half], i // half) for i in (0, half)]
        out, lse = merge_attention(*zip(*parts, strict=True))
        expected, lse_expected = LiteAttention(-math.inf)(query, key, value, return_softmax_lse=True)
        torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(lse, lse_expected)
    assert sparsity(attn) > 0.3


def test_relative_thresholds_count_the_blocks_of_a_split() -> None:
    query, key, value = make_inputs()
    split = SeqParallelLiteAttention(2, threshold=-1.0, rule="mass", relative=True)
    for number, keys in enumerate((slice(0, 4 * BLOCK_K), slice(4 * BLOCK_K, None))):
        alone = LiteAttention(-1.0 - math.log2((4, 2)[number]), rule="mass")
        for _ in range(3):
            out, _ = split(query, key[:, keys], value[:, keys], number)
            assert torch.equal(out, alone(query, key[:, keys], value[:, keys]))


def test_sequence_parallel_has_a_state_for_each_split() -> None:
    query, key, value = make_inputs()
    attn = SeqParallelLiteAttention(num_nodes=2, threshold=None)
    attn.set_threshold(threshold=5)
    assert attn.sparsity is None
    for _ in range(2):
        attn(query, key, value, 0, 0.25, return_softmax_lse=True, must_do_list=[10, 0])
    attn(query, key, value, split_idx=1)
    splits = [split for split in attn.splits if isinstance(split, LiteAttention)]
    first, second = (sparsity(split) for split in splits)
    assert first > 0.0
    assert second == 0.0
    assert sparsity(attn) == pytest.approx(first / 2)
    attn.enable_skip_optimization(enable=False)
    attn(query, key, value, 0)
    assert sparsity(attn) == 0.0
    attn.reset_skip_state()
    assert attn.sparsity is None
    assert [visited_blocks(split) for split in splits] == [[0, 1, 2, 3, 4, 5]] * 2


@pytest.mark.parametrize("split_idx", [-1, 2])
def test_split_out_of_range(split_idx: int) -> None:
    with pytest.raises(IndexError, match=f"split_idx: expected 0 to 1, got {split_idx}"):
        SeqParallelLiteAttention(2)(*make_inputs(), split_idx)


def test_sequence_parallel_errors() -> None:
    with pytest.raises(TypeError, match="split_idx: expected an int, got bool True"):
        SeqParallelLiteAttention(2)(*make_inputs(), True)
    with pytest.raises(TypeError, match="split_idx: expected an int, got float"):
        SeqParallelLiteAttention(2)(*make_inputs(), 0.5)
    with pytest.raises(ValueError, match="return_softmax_lse: expected True"):
        SeqParallelLiteAttention(2)(*make_inputs(), 0, return_softmax_lse=False)
    num_nodes: Any
    for num_nodes in (0, 1.5, True):
        with pytest.raises(ValueError, match="num_nodes: expected an int of 1 or more, got"):
            SeqParallelLiteAttention(num_nodes)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=5), st.integers(0, 2**16))
def test_merging_any_parts_is_exact(sizes: list[int], seed: int) -> None:
    """Also parts without keys, and parts whose scores differ by hundreds."""
    random = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 5, 2, 8, generator=random).double()
    parts = [[torch.randn(2, size, 2, 8, generator=random).double() * 30 for _ in range(2)] for size in sizes]

    def attend(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return reference.forward(query, key, value, None, None, None, None, None, 1.0, False, "running_max")

    outs, lses = zip(*(attend(*part) for part in parts), strict=True)
    out, lse = merge_attention(outs, lses)
    expected, lse_expected = attend(*(torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True)))
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(lse, lse_expected, rtol=1e-9, atol=1e-9)


def test_merging_keeps_the_dtype_and_sums_in_float32() -> None:
    outs = [torch.full((1, 1, 1, 2), 1.0 + i / 128, dtype=torch.bfloat16) for i in range(2)]
    out, lse = merge_attention(outs, [torch.zeros(1, 1, 1)] * 2)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    assert lse.item() == pytest.approx(math.log(2))


def test_merging_ignores_what_parts_without_keys_hold() -> None:
    outs = [torch.full((1, 1, 1, 2), math.nan), torch.ones(1, 1, 1, 2)]
    out, lse = merge_attention(outs, [torch.full((1, 1, 1), -math.inf), torch.zeros(1, 1, 1)])
    assert torch.equal(out, torch.ones(1, 1, 1, 2))
    assert lse.item() == 0.0


@pytest.mark.parametrize(
    ("outs", "lses", "message"),
    [
        ([], [], "lses: expected one for each of one or more outs, got 0 outs, 0 lses"),
        ([torch.ones(1, 2, 3, 4)], [], "got 1 outs, 0 lses"),
        ([torch.ones(1, 2, 3, 4)], [torch.ones(1, 2, 3)], r"lses: expected shape \(1, 3, 2\) of each"),
        (
            [torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 5)],
            [torch.ones(1, 3, 2)] * 2,
            r"outs: expected shape \(1, 2, 3, 4\) of each, got \(1, 2, 3, 5\)",
        ),
    ],
)
def test_merging_refuses_what_does_not_fit(outs: list[Tensor], lses: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge_attention(outs, lses)
