"""The decode operator and the block summaries against their reference."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lite_attention import ops, reference
from lite_attention.native import cpu as kernels
from lite_attention.ranges import unpack_bits
from lite_attention.tiles import DECODE_BLOCK, mask_words

OUT_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@dataclass
class Cache:
    key: Tensor
    value: Tensor
    summaries: Tensor
    block_table: Tensor
    mask: Tensor
    heads: int

    def clone(self) -> Cache:
        return Cache(
            self.key,
            self.value,
            self.summaries.clone(),
            self.block_table,
            self.mask.clone(),
            self.heads,
        )


def make_cache(
    lengths: list[int],
    *,
    kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 32,
    page: int = 32,
    dtype: torch.dtype = torch.float32,
    channel_major: bool = True,
    seed: int = 0,
) -> Cache:
    """A cache whose pages lie in random order; keys drift so that blocks differ in weight."""
    torch.manual_seed(seed)
    pages_a_row = max(1, -(-max(lengths, default=1) // page))
    pages = pages_a_row * len(lengths) + 1
    shape = (pages, page, kv_heads, head_dim)
    key = (torch.randn(shape) + 2 * torch.randn(pages, 1, kv_heads, head_dim)).to(dtype)
    value = torch.randn(shape).to(dtype)
    if channel_major:
        key = key.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    summaries = torch.zeros(ops.summaries_shape(key), dtype=torch.uint8)
    reference.summarize(key, torch.arange(pages * page), summaries)
    table = (torch.randperm(pages - 1) + 1)[: pages_a_row * len(lengths)].view(len(lengths), pages_a_row)
    slots = len(lengths) + 1
    mask = torch.zeros(slots, kv_heads, mask_words(pages_a_row * page // DECODE_BLOCK), dtype=torch.int32)
    return Cache(key, value, summaries, table.int(), mask, kv_heads * group)


def step(
    implementation: object,
    cache: Cache,
    query: Tensor,
    lengths: list[int],
    threshold: float | list[float] = -5.0,
    visit_all: bool | list[bool] = False,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = len(lengths)
    thresholds = torch.tensor(threshold if isinstance(threshold, list) else [threshold] * rows, dtype=torch.float32)
    everything = torch.tensor(visit_all if isinstance(visit_all, list) else [visit_all] * rows, dtype=torch.bool)
    return implementation.decode(  # type: ignore[attr-defined, no-any-return]
        query,
        cache.key,
        cache.value,
        cache.summaries,
        cache.block_table,
        torch.tensor(lengths, dtype=torch.int32),
        torch.arange(1, rows + 1, dtype=torch.int32),
        thresholds,
        everything,
        cache.mask,
        query.shape[2] ** -0.5,
    )


def queries(cache: Cache, rows: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    head_dim = cache.key.shape[3]
    return torch.randn(rows, cache.heads, head_dim, generator=generator).to(cache.key.dtype)


CASES = {
    "one row": {"lengths": [200]},
    "ragged rows": {"lengths": [1, 16, 17, 33, 250]},
    "one off a block": {"lengths": [31, 32, 33, 47, 48, 49]},
    "length 0 is padding": {"lengths": [100, 0, 0]},
    "no rows": {"lengths": []},
    "one head a group": {"lengths": [150], "group": 1},
    "nine heads a group": {"lengths": [150], "kv_heads": 1, "group": 9},
    "sixteen heads a group": {"lengths": [99], "kv_heads": 1, "group": 16},
    "head size 80": {"lengths": [130], "head_dim": 80},
    "head size 256": {"lengths": [130], "head_dim": 256},
    "pages of 16": {"lengths": [130], "page": 16},
    "pages of 128": {"lengths": [300, 129], "page": 128},
    "keys token by token": {"lengths": [200, 77], "channel_major": False},
    "bfloat16": {"lengths": [200, 77], "dtype": torch.bfloat16},
    "bfloat16, keys token by token": {"lengths": [200, 77], "dtype": torch.bfloat16, "channel_major": False},
    "float16": {"lengths": [200, 77], "dtype": torch.float16},
    "a head size that only the reference takes": {"lengths": [100], "head_dim": 24},
    "long": {"lengths": [1500], "kv_heads": 1},
    "longer than what a thread scores at a time": {"lengths": [2600, 2049], "kv_heads": 1},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_decode_equals_the_reference_over_steps(case: dict) -> None:
    lengths = case["lengths"]
    cache = make_cache(**case)
    expected = cache.clone()
    for number in range(3):
        query = queries(cache, len(lengths), seed=number)
        out, lse, visited = step(torch.ops.lite_attention, cache, query, lengths, visit_all=number == 0)
        want, want_lse, want_visited = step(reference, expected, query, lengths, visit_all=number == 0)
        torch.testing.assert_close(out, want, rtol=0, atol=OUT_TOLERANCE[query.dtype])
        torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-4)
        assert torch.equal(visited, want_visited)
        assert torch.equal(cache.mask, expected.mask)


def test_blocks_are_skipped_and_the_error_is_bounded_by_the_threshold() -> None:
    lengths = [1000]
    cache = make_cache(lengths, kv_heads=1)
    query = queries(cache, 1)
    _dense, dense_lse, everything = step(torch.ops.lite_attention, cache, query, lengths, visit_all=True)
    _out, lse, visited = step(torch.ops.lite_attention, cache, query, lengths, threshold=-6)
    assert visited < everything / 2
    assert everything == math.ceil(1000 / DECODE_BLOCK)
    dropped = 1 - torch.exp(lse - dense_lse)
    assert 0 < dropped.max() < (everything - visited) * 2.0**-6


def test_a_row_at_minus_infinity_is_dense_and_leaves_the_state_alone() -> None:
    lengths = [300, 300]
    cache = make_cache(lengths)
    before = cache.clone()
    query = queries(cache, 2)
    out, _, visited = step(torch.ops.lite_attention, cache, query, lengths, threshold=[-math.inf, -4.0], visit_all=True)
    assert torch.equal(cache.mask[1], before.mask[1])
    assert not torch.equal(cache.mask[2], before.mask[2])
    assert visited[0] == 2 * math.ceil(300 / DECODE_BLOCK)
    tokens = cache.block_table[0].long()
    key, value = (c[tokens].flatten(0, 1)[:300].double().transpose(0, 1) for c in (cache.key, cache.value))
    want = torch.nn.functional.scaled_dot_product_attention(
        query[0, :, None].double(), key.repeat_interleave(2, 0), value.repeat_interleave(2, 0)
    )
    torch.testing.assert_close(out[0].double(), want[:, 0], rtol=0, atol=2e-6)


def test_a_block_comes_back_when_its_estimate_says_so() -> None:
    lengths = [320]
    cache = make_cache(lengths, kv_heads=1, group=1, page=16)
    needle = 7
    cache.key[cache.block_table[0, needle]] = 4.0
    reference.summarize(cache.key, torch.arange(cache.key.shape[0] * 16), cache.summaries)
    away, towards = torch.full((1, 1, 32), -0.5), torch.full((1, 1, 32), 0.5)
    step(torch.ops.lite_attention, cache, away, lengths, visit_all=True)
    assert not unpack_bits(cache.mask[1, 0], 20)[needle]
    step(torch.ops.lite_attention, cache, towards, lengths)
    assert unpack_bits(cache.mask[1, 0], 20)[needle]


def test_estimates_of_gaussian_keys_are_right_on_average() -> None:
    torch.manual_seed(0)
    keys = torch.randn(1, 2000 * DECODE_BLOCK, 1, 64)
    summaries = torch.zeros(ops.summaries_shape(keys), dtype=torch.uint8)
    torch.ops.lite_attention.summarize(keys, torch.arange(keys.shape[1]), summaries)
    direction = torch.nn.functional.normalize(torch.randn(1, 64))
    for deviation in (0.0, 0.5, 1.0, 2.0, 3.0, 4.0):
        query = deviation * direction
        got = reference.estimate(query * reference.LOG2_E, summaries[0, 0], reference.EXPECTED_BEND) / reference.LOG2_E
        want = torch.logsumexp((keys[0, :, 0] @ query[0]).view(-1, DECODE_BLOCK), 1)
        assert abs(float((got[0] - want).mean())) < 0.1


def test_the_one_key_that_a_query_looks_for_is_not_lost_in_its_block() -> None:
    torch.manual_seed(0)
    keys = 0.1 * torch.randn(1, DECODE_BLOCK, 1, 64)
    keys[0, 5] = torch.nn.functional.normalize(torch.randn(64), dim=0) * 8
    summaries = torch.zeros(ops.summaries_shape(keys), dtype=torch.uint8)
    torch.ops.lite_attention.summarize(keys, torch.tensor([15]), summaries)
    for bend in (reference.EXPECTED_BEND, reference.GENEROUS_BEND):
        got = reference.estimate(keys[0, 5] * reference.LOG2_E, summaries[0, 0], bend) / reference.LOG2_E
        assert float(got) == pytest.approx(64, abs=0.5)


def test_a_channel_that_outweighs_the_others_does_not_hide_them() -> None:
    torch.manual_seed(0)
    blocks, head_dim = 256, 128
    keys = torch.randn(blocks, DECODE_BLOCK, head_dim) + torch.randn(blocks // 8, 1, head_dim).repeat_interleave(8, 0)
    keys[..., 5] += 200
    cache = keys.view(1, -1, 1, head_dim)
    summaries = torch.zeros(ops.summaries_shape(cache), dtype=torch.uint8)
    torch.ops.lite_attention.summarize(cache, torch.arange(blocks * DECODE_BLOCK), summaries)
    query = torch.randn(8, head_dim) * head_dim**-0.5 * reference.LOG2_E
    got = reference.estimate(query, summaries[0, 0], reference.EXPECTED_BEND)
    want = torch.logsumexp(torch.einsum("hd,btd->hbt", query, keys) * math.log(2), -1) * reference.LOG2_E
    assert float((got - want).square().mean().sqrt()) < 0.4


def test_a_row_does_not_depend_on_its_batch() -> None:
    lengths = [700, 33, 1200, 5]
    together = make_cache(lengths)
    alone = together.clone()
    thresholds = [-4.0, -6.0, -8.0, -2.0]
    for number in range(3):
        query = queries(together, 4, seed=number)
        out, _, _ = step(torch.ops.lite_attention, together, query, lengths, thresholds, visit_all=number == 0)
        for row in range(4):
            single = Cache(
                alone.key,
                alone.value,
                alone.summaries,
                alone.block_table[row : row + 1],
                alone.mask[[0, row + 1]],
                alone.heads,
            )
            mine, _, _ = step(
                torch.ops.lite_attention,
                single,
                query[row : row + 1],
                lengths[row : row + 1],
                thresholds[row],
                visit_all=number == 0,
            )
            assert torch.equal(mine[0], out[row])
            alone.mask[row + 1] = single.mask[1]
    assert torch.equal(alone.mask, together.mask)


def test_garbage_behind_the_end_of_a_sequence_is_never_read() -> None:
    lengths = [37]
    cache = make_cache(lengths, dtype=torch.bfloat16)
    query = queries(cache, 1)
    want, _, _ = step(torch.ops.lite_attention, cache.clone(), query, lengths, visit_all=True)
    for tensor in (cache.key, cache.value):
        tensor[cache.block_table[0, 1], 5:] = math.nan
    out, _, _ = step(torch.ops.lite_attention, cache, query, lengths, visit_all=True)
    assert torch.equal(out, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channel_major", [True, False])
def test_summaries_equal_the_reference(dtype: torch.dtype, channel_major: bool) -> None:
    cache = make_cache([128], dtype=dtype, channel_major=channel_major)
    slots = torch.tensor([15, -1, 31, 40, 47, 64 + 15])
    got, want = torch.zeros_like(cache.summaries), torch.zeros_like(cache.summaries)
    torch.ops.lite_attention.summarize(cache.key, slots, got)
    reference.summarize(cache.key, slots, want)
    for part, wanted in zip(reference.read_summaries(got), reference.read_summaries(want), strict=True):
        torch.testing.assert_close(part, wanted, rtol=0, atol=float(wanted.abs().max()) / 120)
    assert (want != 0).any(-1).sum() == 4 * want.shape[1]
    keys = cache.key[0, :16].float()
    for head, parts in enumerate(zip(*reference.read_summaries(want[0, :, 0]), strict=True)):
        of_head = keys[:, head]
        farthest = int((of_head - of_head.mean(0)).norm(dim=1).argmax())
        others = torch.cat((of_head[:farthest], of_head[farthest + 1 :]))
        exact = of_head[farthest], others.mean(0), others.std(0, correction=0)
        for part, wanted, squares in zip(parts, exact, (15**2, 63**2, None), strict=True):
            size, largest = wanted.abs(), wanted.abs().max()
            # Half of the distance between two levels, and what the scale moves.
            off = (size * largest / squares).sqrt() + largest / squares if squares else largest / 15 / 2
            assert ((part - wanted).abs() <= off + 0.02 * size).all()
            assert float(part @ wanted) == pytest.approx(float(wanted @ wanted), rel=1e-5)


@pytest.mark.parametrize("value", [0.0, 1e-38, 1e15])
def test_summaries_of_extreme_keys_stay_finite(value: float) -> None:
    key = torch.tensor([value, -value]).repeat(8).view(1, 16, 1, 1).expand(1, 16, 1, 16).contiguous()
    summaries = torch.zeros(ops.summaries_shape(key), dtype=torch.uint8)
    torch.ops.lite_attention.summarize(key, torch.tensor([15]), summaries)
    assert all(part.isfinite().all() for part in reference.read_summaries(summaries))


def test_the_operators_satisfy_opcheck() -> None:
    cache = make_cache([100])
    arguments = (
        queries(cache, 1),
        cache.key,
        cache.value,
        cache.summaries,
        cache.block_table,
        torch.tensor([100], dtype=torch.int32),
        torch.tensor([1], dtype=torch.int32),
        torch.tensor([-5.0]),
        torch.tensor([True]),
        cache.mask,
        0.2,
    )
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.lite_attention.decode.default, arguments, test_utils=checks)
    torch.library.opcheck(
        torch.ops.lite_attention.summarize.default,
        (cache.key, torch.tensor([15]), cache.summaries),
        test_utils=checks,
    )


@pytest.mark.parametrize(
    ("name", "replacement", "message"),
    [
        ("query", torch.zeros(1, 3, 32), "query: expected a multiple of 2 heads, got 3"),
        ("query", torch.zeros(1, 4, 16), r"query: expected shape \(1, 4, 32\)"),
        ("key_cache", torch.zeros(4, 20, 2, 32), "key_cache: expected .*multiple of 16"),
        ("seq_lens", torch.tensor([100]), "seq_lens: expected torch.int32, got torch.int64"),
        ("mask", torch.zeros(2, 1, 1, dtype=torch.int32), "mask: expected"),
    ],
)
def test_errors_name_the_argument(name: str, replacement: Tensor, message: str) -> None:
    cache = make_cache([100])
    arguments = {
        "query": queries(cache, 1),
        "key_cache": cache.key,
        "value_cache": cache.value,
        "summaries": cache.summaries,
        "block_table": cache.block_table,
        "seq_lens": torch.tensor([100], dtype=torch.int32),
        "slots": torch.tensor([1], dtype=torch.int32),
        "thresholds": torch.tensor([-5.0]),
        "visit_all": torch.tensor([True]),
        "mask": cache.mask,
        "scale": 0.2,
    }
    with pytest.raises((TypeError, ValueError), match=message):
        torch.ops.lite_attention.decode(**arguments | {name: replacement})


def test_the_compiled_kernels_are_there() -> None:
    available, detail = kernels.status()
    assert available, detail
