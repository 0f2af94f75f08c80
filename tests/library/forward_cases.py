"""What the tests of `lite_attention::forward` share: shapes, inputs, states, and the comparison of one step."""

import math
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from lite_attention import ops, reference
from lite_attention.options import Rule
from lite_attention.ranges import all_blocks, pack_bits, unpack_bits
from lite_attention.tiles import BLOCK_K, TILE_Q, ceil_div

RULES: tuple[Rule, ...] = ("running_max", "mass")
"""Those that leave out what is skipped, and that causal attention can have."""

ALL_RULES: tuple[Rule, ...] = get_args(Rule)

Inputs = tuple[Tensor, Tensor, Tensor]


class Tolerance(NamedTuple):
    """How far an implementation may be from the float64 reference."""

    out: float
    """Of one element of the output, absolute or relative."""
    norm: float
    """Of the whole output: norm of the difference over norm of the reference."""
    lse: float
    """Of one log-sum-exp, absolute or relative."""
    margin: float
    """log2 units by which rounding may move a decision."""


CPU_TOLERANCE = {
    torch.float32: Tolerance(2e-5, 2e-6, 1e-5, 1e-3),
    torch.float16: Tolerance(2e-3, 5e-4, 1e-5, 1e-3),
    torch.bfloat16: Tolerance(1.6e-2, 4e-3, 1e-5, 1e-3),
}


class Shape(NamedTuple):
    batch: int = 1
    tokens_q: int = 200
    tokens_k: int = 330
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 16

    @property
    def tiles(self) -> int:
        return ceil_div(self.tokens_q, TILE_Q)

    @property
    def blocks(self) -> int:
        return ceil_div(self.tokens_k, BLOCK_K)


SHAPES = {
    "one tile and block": Shape(tokens_q=128, tokens_k=64),
    "one off a tile and a block": Shape(tokens_q=129, tokens_k=257),
    "one short of a tile and a block": Shape(tokens_q=127, tokens_k=191),
    "grouped heads": Shape(heads=6, kv_heads=2),
    "one kv head": Shape(heads=3, kv_heads=1, tokens_q=40),
    "batch": Shape(batch=3, tokens_q=150, tokens_k=150),
    "one query": Shape(tokens_q=1),
    "one key": Shape(tokens_k=1),
    "one token": Shape(tokens_q=1, tokens_k=1),
    "more queries than keys": Shape(tokens_q=300, tokens_k=100),
    "odd head size": Shape(head_dim=7),
    "more blocks than a word": Shape(tokens_q=20, tokens_k=33 * BLOCK_K - 5, heads=1, kv_heads=1),
}


class State(NamedTuple):
    mask: Tensor
    lse: Tensor

    def copy(self) -> "State":
        return State(self.mask.clone(), self.lse.clone())

    def to(self, device: torch.device | str) -> "State":
        return State(self.mask.to(device), self.lse.to(device))


def make_inputs(shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> Inputs:
    """Inputs whose key blocks differ much in weight, so that thresholds of -2 to -10 clear some of them."""
    random = torch.Generator().manual_seed(seed)
    batch, tokens_q, tokens_k, heads, kv_heads, head_dim = shape
    direction = torch.ones(head_dim)
    levels = torch.rand(batch, ceil_div(tokens_k, BLOCK_K), kv_heads, 1, generator=random) * 16 - 8
    levels = levels.repeat_interleave(BLOCK_K, dim=1)[:, :tokens_k]
    query = 0.5 * torch.randn(batch, tokens_q, heads, head_dim, generator=random) + direction
    key = 0.5 * torch.randn(batch, tokens_k, kv_heads, head_dim, generator=random)
    key = key + direction * levels * head_dim**-0.5
    value = torch.randn(batch, tokens_k, kv_heads, head_dim, generator=random)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def level_inputs(
    levels: list[float], tokens_q: int = 3, head_dim: int = 1, dtype: torch.dtype = torch.float32
) -> Inputs:
    """Inputs for scale ln(2) in which every score of block i is ``levels[i]`` in log2 units."""
    key = torch.zeros(1, len(levels) * BLOCK_K, 1, head_dim, dtype=dtype)
    key[0, :, 0, 0] = torch.tensor(levels).repeat_interleave(BLOCK_K)
    return torch.ones(1, tokens_q, 1, head_dim, dtype=dtype), key, key.clone()


def fresh_state(shape: Shape) -> State:
    mask = all_blocks(shape.blocks).repeat(shape.batch, shape.heads, shape.tiles, 1)
    return State(mask, torch.full((shape.batch, shape.heads, shape.tokens_q), math.inf))


def block_bits(blocks: int, *chosen: int) -> Tensor:
    bits = torch.zeros(blocks, dtype=torch.bool)
    bits[list(chosen)] = True
    return pack_bits(bits)


def sparsity_of(mask: Tensor, tokens_k: int) -> float:
    return 1.0 - unpack_bits(mask, ceil_div(tokens_k, BLOCK_K)).double().mean().item()


def assert_step_agrees(
    inputs: Inputs,
    state: State,
    thresholds: list[float],
    rule: Rule,
    must_visit: Tensor | None = None,
    must_skip: Tensor | None = None,
    causal: bool = False,
    *,
    scale: float | None = None,
    tolerances: dict[torch.dtype, Tolerance] = CPU_TOLERANCE,
) -> None:
    """Step ``state`` with the operator on the device of ``inputs``; compare with the float64 reference.

    The reference takes the same step from the same state, so differences do not add up over steps, with summaries
    rounded as the operator's are. Bits may differ where a decision lies within the margin of the threshold: see
    `assert_mask_agrees`.
    """
    tolerance = tolerances[inputs[0].dtype]
    device = inputs[0].device
    scale = inputs[0].shape[3] ** -0.5 if scale is None else scale
    query, key, value = (tensor.cpu().double() for tensor in inputs)
    summaries = reference.summarize_blocks(inputs[1].cpu(), inputs[2].cpu())
    before = state.to("cpu").copy()

    pairs, pairs_expected = (torch.full((), -1, dtype=torch.int64, device=place) for place in (device, "cpu"))

    def expected(shift: float) -> tuple[Tensor, Tensor, State]:
        after = before.copy()
        shifted = torch.tensor(thresholds) + shift
        arguments = (*after, shifted, must_visit, must_skip, scale, causal, rule, summaries)
        out, lse = reference.forward(query, key, value, *arguments, pairs_visited=pairs_expected)
        return out, lse, after

    out_expected, lse_expected, lower = expected(-tolerance.margin)
    _, _, higher = expected(tolerance.margin)
    out, lse = ops.forward(
        *inputs,
        *state,
        torch.tensor(thresholds, device=device),
        None if must_visit is None else must_visit.to(device),
        None if must_skip is None else must_skip.to(device),
        scale,
        causal,
        rule,
        pairs_visited=pairs,
    )
    assert int(pairs) == int(pairs_expected)
    assert out.dtype == inputs[0].dtype
    assert out.shape == query.shape
    assert out.is_contiguous()
    assert lse.dtype == torch.float32
    assert_result_agrees(out, lse, out_expected, lse_expected, tolerance)
    torch.testing.assert_close(state.lse.cpu(), lower.lse, rtol=tolerance.lse, atol=tolerance.lse)
    assert_mask_agrees(state.mask.cpu(), lower.mask, higher.mask)


def assert_result_agrees(
    out: Tensor, lse: Tensor, out_expected: Tensor, lse_expected: Tensor, tolerance: Tolerance
) -> None:
    """Compare a result with the float64 one, element by element and, the output, as a whole."""
    out, lse = (tensor.to(out_expected.device).double() for tensor in (out, lse))
    torch.testing.assert_close(lse, lse_expected, rtol=tolerance.lse, atol=tolerance.lse)
    torch.testing.assert_close(out, out_expected, rtol=tolerance.out, atol=tolerance.out)
    error = float((out - out_expected).norm())
    bound = tolerance.norm * float(out_expected.norm())
    assert error <= bound, f"norm of the error {error:.3g}, expected at most {bound:.3g}"


def assert_mask_agrees(mask: Tensor, lower: Tensor, higher: Tensor) -> None:
    """Each tile must clear what the rule clears at a lower threshold, and keep what it keeps at a higher one.

    Where everything would go, one block stays, which the other threshold may clear: equal to either is right too.
    """
    between = ((mask & higher) == higher).all(-1) & ((mask & lower) == mask).all(-1)
    right = between | (mask == higher).all(-1) | (mask == lower).all(-1)
    assert right.all(), f"wrong bits in (sequence, head, tile) {(~right).nonzero().tolist()}"
