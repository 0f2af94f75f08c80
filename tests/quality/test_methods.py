"""The emulator is exact: against the reference where there is one, and by what each policy promises elsewhere."""

import math
from functools import partial
from typing import get_args

import pytest
import torch
from torch import Tensor

from benchmarks.quality import methods
from benchmarks.quality.methods import (
    BinnedBudget,
    Decision,
    EmulatedAttention,
    Grid,
    Mass,
    MassBudget,
    Policy,
    ProductAttention,
    RelativeMass,
    RunningMax,
    Statistics,
    choose_methods,
)
from lite_attention import reference
from lite_attention.backend.denoising import Phase
from lite_attention.options import Rule
from lite_attention.ranges import all_blocks, unpack_bits
from lite_attention.tiles import BLOCK_K, TILE_Q, ceil_div

pytestmark = pytest.mark.usefixtures("one_thread")

Inputs = tuple[Tensor, Tensor, Tensor]
assert_close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)


def steps(number: int, tokens_q: int = 300, tokens_k: int = 430, heads: int = 2, kv_heads: int = 1) -> list[Inputs]:
    """Inputs of steps that change a little from one to the next; scores differ much between blocks."""
    random = torch.Generator().manual_seed(0)
    levels = torch.randn(1, ceil_div(tokens_k, 40), 1, 1, generator=random)
    levels[:, -1] = 2.0
    levels = levels.repeat_interleave(40, 1)[:, :tokens_k]
    query = 1.0 + 0.3 * torch.randn(2, tokens_q, heads, 16, generator=random)
    key = levels + 0.4 * torch.randn(2, tokens_k, kv_heads, 16, generator=random)
    value = torch.randn(2, tokens_k, kv_heads, 16, generator=random)
    drift = 0.05 * torch.randn(number, *key.shape, generator=random)
    return [(query, key + change, value) for change in drift]


def dense(inputs: Inputs) -> Tensor:
    return methods.dense_attention(*(tensor.double() for tensor in inputs)).float()


def policy_of(rule: Rule, threshold: float, refresh_interval: int = 0) -> Policy:
    decision = RunningMax(threshold) if rule == "running_max" else Mass(threshold)
    summaries: methods.Summaries = "bend" if rule == "mass_summaries" else "none"
    return Policy(decision, summaries=summaries, refresh_interval=refresh_interval)


@pytest.mark.parametrize(
    ("rule", "threshold_at"),
    [("running_max", -5.0), ("mass", -7.0), ("mass_summaries", -7.0), ("mass_summaries", -3.0)],
)
@pytest.mark.parametrize("scores_at_once", [methods.SCORES_AT_ONCE, 1])
def test_emulator_equals_the_reference(
    rule: Rule, threshold_at: float, scores_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "SCORES_AT_ONCE", scores_at_once)
    attention = EmulatedAttention(policy_of(rule, threshold_at))
    tokens_q, tokens_k, heads = 300, 430, 2
    blocks, tiles = ceil_div(tokens_k, BLOCK_K), ceil_div(tokens_q, TILE_Q)
    mask, lse = all_blocks(blocks).repeat(2, heads, tiles, 1), torch.full((2, heads, tokens_q), math.inf)
    threshold = torch.full((2,), threshold_at)
    skipped = 0.0
    for inputs in steps(4, tokens_q, tokens_k, heads):
        out = attention(*inputs)
        skipped = max(skipped, float(attention.sparsity))
        query, key, value = (tensor.double() for tensor in inputs)
        expected, expected_lse = reference.forward(
            query, key, value, mask, lse, threshold, None, None, 16**-0.5, False, rule
        )
        assert_close(out, expected.float())
        assert attention.lse is not None
        assert_close(attention.lse / reference.LOG2_E, expected_lse.float())
        assert attention.visits is not None and torch.equal(attention.visits, unpack_bits(mask, blocks))
    assert 0.2 < skipped < 0.9


@pytest.mark.parametrize("rule", get_args(Rule))
def test_product_and_emulator_agree_about_every_figure(rule: Rule) -> None:
    product = ProductAttention(-6.0, rule, refresh_interval=3)
    emulated = EmulatedAttention(policy_of(rule, -6.0, refresh_interval=3))
    phases: list[Phase] = ["skip", "dense", "skip", "learn", "learn", "skip", "skip"]
    for inputs, phase in zip(steps(len(phases)), phases, strict=True):
        assert_close(product(*inputs, phase), emulated(*inputs, phase))
        torch.testing.assert_close(product.sparsity, emulated.sparsity)
        torch.testing.assert_close(product.dropped, emulated.dropped, rtol=1e-3, atol=1e-6)
    assert product.milliseconds() is None


def test_the_emulator_computes_in_float32_wherever_it_is_called() -> None:
    inputs = steps(1)[0]
    exact = EmulatedAttention(Policy(Mass(-6.0), summaries="variance"))(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(EmulatedAttention(Policy(Mass(-6.0), summaries="variance"))(*inputs), exact)
    half = EmulatedAttention(Policy(Mass(-6.0)))(*(tensor.bfloat16() for tensor in inputs))
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("summaries", get_args(methods.Summaries))
@pytest.mark.parametrize("grid", [Grid(), Grid(block_k=176), Grid(tile_q=64, block_k=32), Grid(block_k=1000)])
def test_first_step_and_dense_steps_are_dense(summaries: methods.Summaries, grid: Grid) -> None:
    attention = EmulatedAttention(Policy(Mass(-4.0), grid, summaries))
    first, second, third = steps(3)
    assert_close(attention(*first), dense(first))
    visits = attention.visits
    assert_close(attention(*second, phase="dense"), dense(second))
    assert float(attention.sparsity) == 0.0
    assert attention.visits is visits
    attention(*third)


@pytest.mark.parametrize(
    "decision", [RunningMax(0.0), Mass(0.0), RelativeMass(0.0), MassBudget(0.0), BinnedBudget(0.0)]
)
@pytest.mark.parametrize("summaries", ["none", "variance"])
def test_no_tile_is_left_with_nothing_to_visit(decision: Decision, summaries: methods.Summaries) -> None:
    attention = EmulatedAttention(Policy(decision, summaries=summaries))
    for inputs in steps(4):
        assert attention(*inputs).isfinite().all()
        assert attention.visited is not None and attention.visited.any(-1).all()


@pytest.mark.parametrize(("summaries", "spread"), [("mean", 0.0), ("variance", 0.7), ("bend", 0.4)])
def test_summaries_stand_in_for_skipped_blocks(summaries: methods.Summaries, spread: float) -> None:
    # Keys of a block are alike, or Gaussian and many: then the estimate is right.
    random = torch.Generator().manual_seed(0)
    block, head_dim = 4096, 8
    # In float64: sums of thousands of equal float32 numbers are off by up to 3e-4, more or less with the processor.
    query = torch.randn(1, 16, 1, head_dim, generator=random).double()
    means = torch.randn(1, 4, 1, head_dim, generator=random).repeat_interleave(block, 1).double()
    key = means + spread * torch.randn(means.shape, generator=random)
    value = torch.randn(1, 4, 1, head_dim, generator=random).repeat_interleave(block, 1).double()
    visits = torch.tensor([True, False, False, True]).view(1, 1, 1, 4)
    grid = Grid(16, block)
    step = methods.attend(query, key, value, visits, None, grid, summaries)
    tolerance = 1e-5 if spread == 0 else 0.05
    torch.testing.assert_close(step.out.float(), dense((query, key, value)), rtol=tolerance, atol=tolerance)
    without = methods.attend(query, key, value, visits, None, grid)
    assert (without.out - dense((query, key, value))).abs().max() > 0.2
    assert 0.05 < float(step.dropped.mean()) < 0.95
    torch.testing.assert_close(step.dropped, without.dropped)


def test_a_block_comes_back_by_its_summary_only() -> None:
    query = torch.ones(1, 128, 1, 16)
    levels = torch.tensor([0.0, -4.0, 0.0]).repeat_interleave(64)
    key = levels[None, :, None, None].expand(1, 192, 1, 16).contiguous()
    value = torch.randn(1, 192, 1, 16, generator=torch.Generator().manual_seed(0))
    for summaries, comes_back in (("none", False), ("variance", True)):
        attention = EmulatedAttention(Policy(Mass(-6.0), summaries=summaries))  # type: ignore[arg-type]
        attention(query, key, value)
        attention(query, key, value)
        assert attention.visits is not None
        assert attention.visits[0, 0, 0].tolist() == [True, False, True]
        attention(query, torch.zeros_like(key), value)
        assert attention.visits[0, 0, 0].tolist() == [True, comes_back, True]


def test_refresh_visits_all() -> None:
    attention = EmulatedAttention(Policy(Mass(-5.0), refresh_interval=3))
    sparsities = []
    for inputs in steps(7):
        attention(*inputs)
        sparsities.append(float(attention.sparsity))
    # The first step knows no LSE, so nothing is cleared before the second.
    assert [sparsity == 0.0 for sparsity in sparsities] == [True, True, False, True, False, False, True]


def statistics(shares: list[float]) -> Statistics:
    share = torch.tensor(shares).view(1, 1, 1, -1)
    return Statistics(margin=share.log2(), share=share.log2(), tile_share=share)


@pytest.mark.parametrize("over", ["mean", "worst"])
def test_budget_drops_the_smallest_blocks_up_to_it(over: str) -> None:
    decision = MassBudget(-3.0, over)  # type: ignore[arg-type]
    kept = decision(statistics([0.05, 0.5, 0.04, 0.06, 0.35]))
    assert kept.flatten().tolist() == [False, True, False, True, True]


def test_budget_bounds_what_is_dropped_over_many_steps() -> None:
    # Nothing changes: what was dropped once counts against the budget from then on.
    attention = EmulatedAttention(Policy(MassBudget(-4.0)))
    inputs = steps(1)[0]
    for _ in range(6):
        attention(*inputs)
        assert float(attention.dropped) <= 2.0**-4
    assert float(attention.sparsity) > 0.2


def test_binned_budget_drops_whole_powers_of_two() -> None:
    shares = [0.02, 0.03, 0.5, 0.02, 0.03, 0.4]
    # Bins [1/64, 1/32) with 0.1 in all, [1/4, 1/2) and [1/2, 1).
    assert BinnedBudget(math.log2(0.09))(statistics(shares)).all()
    kept = BinnedBudget(math.log2(0.11))(statistics(shares))
    assert kept.flatten().tolist() == [False, False, True, False, False, True]


def test_binned_budget_is_within_the_budget_of_a_sort_and_near_it() -> None:
    shares = torch.rand(2, 3, 4, 200, generator=torch.Generator().manual_seed(0)).pow(8)
    shares /= shares.sum(-1, keepdim=True)
    known = Statistics(shares.log2(), shares.log2(), shares)
    exact, binned = MassBudget(-4.0)(known), BinnedBudget(-4.0)(known)
    assert not (exact & ~binned).any()
    assert (shares * ~binned).sum(-1).max() <= 2.0**-4
    assert (~binned).float().mean() > 0.7 * (~exact).float().mean()


def test_rotating_refresh_visits_every_block_in_its_turn() -> None:
    attention = EmulatedAttention(Policy(Mass(-1.0), Grid(block_k=20), refresh_interval=4, rotating=True))
    visited = []
    for inputs in steps(10):
        attention(*inputs)
        assert attention.visited is not None
        visited.append(attention.visited)
    turns = torch.arange(visited[0].shape[-1]) % 4
    for number in range(2, 10):
        assert visited[number][..., turns == number % 4].all()
        assert not visited[number][..., turns != number % 4].all()


def in_pass_by_hand(inputs: Inputs, threshold: float, grid: Grid, first: Tensor | None = None) -> tuple[Tensor, float]:
    """One pass that uses no block whose largest score is no more than the threshold above those before it."""
    query, key, value = (tensor.double() for tensor in inputs)
    out = torch.empty_like(query)
    blocks = ceil_div(key.shape[1], grid.block_k)
    used = total = 0
    for row in range(query.shape[0]):
        for head in range(query.shape[2]):
            for tile, queries in enumerate(query[row, :, head].split(grid.tile_q)):
                scores = queries @ key[row, :, 0].T * (query.shape[3] ** -0.5 * reference.LOG2_E)
                order = list(range(blocks))[::-1]
                if first is not None:
                    order.sort(key=lambda block: block != int(first[row, head, tile]))
                running_max = torch.full((len(queries),), -math.inf, dtype=torch.float64)
                for block in order:
                    columns = slice(block * grid.block_k, (block + 1) * grid.block_k)
                    block_max = scores[:, columns].amax(1)
                    negligible = bool((block_max - running_max <= threshold).all())
                    running_max = torch.maximum(running_max, block_max)
                    scores[:, columns].masked_fill_(torch.tensor(negligible), -math.inf)
                    used, total = used + (not negligible), total + 1
                rows = slice(tile * grid.tile_q, (tile + 1) * grid.tile_q)
                out[row, rows, head] = torch.softmax(scores * math.log(2), 1) @ value[row, :, 0]
    return out.float(), used / total


@pytest.mark.parametrize("grid", [Grid(), Grid(block_k=40), Grid(tile_q=16, block_k=40)])
def test_negligible_blocks_are_not_used_in_the_very_pass(grid: Grid) -> None:
    attention = EmulatedAttention(Policy(Mass(-math.inf), grid, in_pass=-3.0))
    for inputs in steps(2):
        out, used = in_pass_by_hand(inputs, -3.0, grid)
        assert_close(attention(*inputs), out)
        # The scores of all are computed, which is half of the work.
        assert float(attention.sparsity) == pytest.approx((1 - used) / 2)
        assert 0.05 < float(attention.sparsity) < 0.5
        assert (out - dense(inputs)).abs().max() > 1e-3
    assert_close(attention(*inputs, phase="dense"), dense(inputs))


def heavy_in_front(number: int) -> list[Inputs]:
    """`steps` with scores that grow from the block that is visited first to the last."""
    order = steps(1)[0][1].mean((0, 2, 3)).argsort(descending=True)
    return [(query, key[:, order], value) for query, key, value in steps(number)]


def test_the_heaviest_block_of_the_step_before_comes_first() -> None:
    grid = Grid(tile_q=16, block_k=40)
    attention = EmulatedAttention(Policy(Mass(-math.inf), grid, order="heaviest", in_pass=-3.0))
    first, second = heavy_in_front(2)
    assert_close(attention(*first), in_pass_by_hand(first, -3.0, grid)[0])
    step = methods.attend(*first, torch.ones(2, 2, 19, 11, dtype=torch.bool), None, grid, "none", None, -3.0)
    heaviest = step.statistics.tile_share.argmax(-1)
    out, used = in_pass_by_hand(second, -3.0, grid, heaviest)
    assert_close(attention(*second), out)
    assert float(attention.sparsity) == pytest.approx((1 - used) / 2)
    assert used < in_pass_by_hand(second, -3.0, grid)[1]


def test_a_running_max_that_begins_with_the_heaviest_block_clears_more() -> None:
    sparsities = {}
    for order in ("descending", "heaviest"):
        attention = EmulatedAttention(Policy(RunningMax(-2.0), Grid(16, 40), order=order))  # type: ignore[arg-type]
        for inputs in heavy_in_front(3):
            attention(*inputs)
        sparsities[order] = float(attention.sparsity)
    assert sparsities["heaviest"] > sparsities["descending"]


def test_what_is_negligible_in_the_pass_by_the_number_of_its_keys_is_so_by_mass() -> None:
    # A block whose keys are all 2**-(-9 - 6) below the running maximum has no more than 2**-9 of any row.
    attention = EmulatedAttention(Policy(Mass(-9.0), in_pass=-15.0))
    plain = EmulatedAttention(Policy(Mass(-9.0)))
    for inputs in steps(4):
        assert_close(attention(*inputs), plain(*inputs), rtol=0, atol=0.01)
    assert attention.visits is not None and plain.visits is not None
    assert not (plain.visits & ~attention.visits).any()


def test_relative_mass_means_the_same_at_every_length() -> None:
    for blocks in (8, 64):
        uniform = [1 / blocks] * blocks
        assert RelativeMass(-0.5)(statistics(uniform)).all()
        assert not RelativeMass(0.5)(statistics(uniform)).any()


def test_methods_are_chosen_by_name_pattern_and_threshold() -> None:
    chosen = choose_methods(["product-mass", "*-variance:-6,-5"])
    assert [str(method) for method in chosen] == [
        *(f"product-mass {threshold:g}" for threshold in methods.METHODS["product-mass"].thresholds),
        *(f"{name} {threshold}" for name in ("mass-variance", "budget-variance") for threshold in (-6, -5)),
    ]
    assert chosen[-1].make() is not chosen[-1].make()
    with pytest.raises(ValueError, match="expected a name or pattern of product-dense.*got 'sparge'"):
        choose_methods(["sparge"])
    with pytest.raises(ValueError, match="expected numbers with commas behind budget:, got 'x'"):
        choose_methods(["budget:x"])


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_runs_and_skips_between_its_dense_steps(name: str) -> None:
    method = choose_methods([name])[-1]
    attention = method.make()
    for number, inputs in enumerate(steps(3, tokens_q=150, tokens_k=400)):
        out = attention(*inputs, phase=method.phase(number, 3))
        assert out.shape == inputs[0].shape and out.isfinite().all()
        assert 0.0 <= float(attention.dropped) <= 1.0
        if number < method.warmup_steps or number >= 3 - method.cooldown_steps:
            assert float(attention.sparsity) == 0.0
