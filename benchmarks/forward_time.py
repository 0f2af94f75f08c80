"""How fast `lite_attention::forward` is on a GPU: against FlashAttention 3, and by the share of blocks skipped.

All that is compared runs in one process on the same inputs: in each round every call is timed in turn (CUDA events,
median, L2 cache flushed between calls), a ratio is taken within a round, and the median of the rounds is kept.
Compare ratios; milliseconds move with the clock of the GPU. FlashAttention 3 is the package fa3-fwd; without it only
the project's own times are shown.

Groups:
    dense     every head size and length, causal and not, a batch: against FlashAttention 3
    tracking  deciding in every visited block while nothing is cleared: what the rules cost
    sparse    a share of the blocks skipped, chosen one by one or in runs of 8; the mask stays as it is
    skewed    as sparse, but some rows of the mask keep many times what others do
    summaries what it costs that summaries stand in for skipped blocks, against leaving them out, where all of them come
              back in the next step and where none does, as in a settled sequence of steps; making them alone

Examples:
    python -m benchmarks.forward_time                          # everything, about two minutes on an H100
    python -m benchmarks.forward_time --quick                  # the smallest shape of each group
    python -m benchmarks.forward_time --only sparse --out /tmp/results
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.results import DIRECTORY, write_result
from lite_attention import ops
from lite_attention.forward_cuda import summarize_blocks
from lite_attention.options import Rule, needs_lse
from lite_attention.ranges import all_blocks, pack_bits, unpack_bits
from lite_attention.tiles import BLOCK_K, TILE_Q, ceil_div

NEVER = -50.0  # a threshold that no block passes, so that the mask stays as it is
SHARES = (0.2, 0.4, 0.6, 0.8, 0.9)
RUNS = (1, 8)
SKEWED_SHARES = (0.4, 0.6, 0.9)
SUMMARIZED_SHARES = (0.0, 0.5, 0.9)
COMES_BACK = {
    "everything": NEVER,
    "nothing": -2.0,
}  # thresholds that a skipped block passes by its summary, or does not
DTYPE = torch.bfloat16

Call = Callable[[], Any]


class Workload(NamedTuple):
    tokens: int
    heads: int
    head_dim: int
    batch: int = 1
    causal: bool = False
    spread: int = 1
    """Standard deviation of the scores; at 4 a few keys carry most of each query's weight."""

    def __str__(self) -> str:
        batch = f"{self.batch} × " if self.batch > 1 else ""
        sharp = f", spread {self.spread}" if self.spread > 1 else ""
        return f"{batch}{self.tokens} × {self.heads}" + (", causal" if self.causal else "") + sharp

    @property
    def operations(self) -> float:
        """Floating-point operations of the two products; a causal pass needs half of them."""
        pairs = self.batch * self.heads * self.tokens**2 / (2 if self.causal else 1)
        return 4 * pairs * self.head_dim

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        random = torch.Generator("cuda").manual_seed(0)
        shape = (3, self.batch, self.tokens, self.heads, self.head_dim)
        query, key, value = torch.randn(shape, dtype=DTYPE, device="cuda", generator=random)
        return query * self.spread, key, value


LONG = [Workload(16384, 24, 128), Workload(32760, 12, 128), Workload(75600, 8, 128)]
GROUPS = {
    "dense": [
        *(Workload(4096, 24, head_dim) for head_dim in (128, 64)),
        *LONG,
        *(workload._replace(head_dim=64) for workload in LONG),
        *(Workload(16384, 12, head_dim) for head_dim in (96, 192, 256)),
        Workload(12544, 6, 64),
        *(Workload(tokens, heads, 128, causal=True) for tokens, heads in ((16384, 24), (8192, 16), (2048, 32))),
        Workload(16384, 24, 128, spread=4),
        Workload(1024, 64, 128, batch=4),
    ],
    "tracking": LONG,
    "sparse": LONG,
    "skewed": [Workload(12544, 6, 64), *LONG],
    "summaries": [Workload(32760, 12, head_dim) for head_dim in (128, 64)],
}


def flash_attention_3() -> Callable[..., Any] | None:
    """The function of the package fa3-fwd; None where it is not installed."""
    try:
        from fa3_fwd_interface import flash_attn_func
    except ImportError:
        return None
    return flash_attn_func


def fa3_call(inputs: tuple[Tensor, Tensor, Tensor], causal: bool = False) -> dict[str, Call]:
    function = flash_attention_3()
    return {} if function is None else {"fa3": lambda: function(*inputs, causal=causal)}


def dense_call(inputs: tuple[Tensor, Tensor, Tensor], causal: bool = False) -> Call:
    scale = inputs[0].shape[3] ** -0.5
    return lambda: ops.forward(*inputs, None, None, None, None, None, scale, causal, "running_max")


def tracking_call(inputs: tuple[Tensor, Tensor, Tensor], mask: Tensor, rule: Rule, threshold: float = NEVER) -> Call:
    """A call that visits what ``mask`` says and clears what passes ``threshold``; a rule that has a state has that of a
    former step."""
    query = inputs[0]
    batch, tokens, heads, head_dim = query.shape
    lse_state = None
    if needs_lse(rule):
        lse_state = torch.full((batch, heads, tokens), math.inf, dtype=torch.float32, device=query.device)
    thresholds = torch.full((batch,), threshold, device=query.device)

    def call() -> Any:
        return ops.forward(*inputs, mask, lse_state, thresholds, None, None, head_dim**-0.5, False, rule)

    call()
    return call


def restoring_call(inputs: tuple[Tensor, Tensor, Tensor], mask: Tensor, rule: Rule, threshold: float = NEVER) -> Call:
    """The same with a copy of ``mask`` that is made again before each call: summaries have skipped blocks come back."""
    stepped = mask.clone()
    call = tracking_call(inputs, stepped, rule, threshold)

    def restored() -> Any:
        stepped.copy_(mask)
        return call()

    return restored


def random_mask(
    workload: Workload, share: float, run: int, skew: float = 0.0, device: torch.device | str = "cuda"
) -> Tensor:
    """A mask that skips about ``share`` of the blocks in runs of ``run``; the last block of each tile stays.

    What a row of the mask keeps is log-normal, with ``skew`` as the deviation of its logarithm, and at most all.
    """
    random = torch.Generator(device).manual_seed(0)
    blocks, tiles = ceil_div(workload.tokens, BLOCK_K), ceil_div(workload.tokens, TILE_Q)
    size = (workload.batch, workload.heads, tiles, ceil_div(blocks, run))
    spread = torch.randn((*size[:3], 1), device=device, generator=random) * skew - skew**2 / 2
    bits = torch.rand(size, device=device, generator=random) < (1 - share) * spread.exp()
    bits = bits.repeat_interleave(run, -1)[..., :blocks]
    bits[..., -1] = True
    return pack_bits(bits)


def measure(calls: dict[str, Call], workload: Workload, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call in each round, taken in turns; each round begins with another call."""
    from triton.testing import do_bench

    # Short calls are repeated for 60 ms a round, long ones about five times.
    expected = workload.operations / 600e12 * 1e3
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            times[name].append(do_bench(calls[name], warmup=10, rep=max(60, 5 * expected), return_mode="median"))
        # Each call finds the GPU as warm as the one before has left it.
        names = [*names[1:], names[0]]
    return times


def ratio(times: dict[str, list[float]], slower: str, faster: str) -> float | None:
    """Median over the rounds of how many times faster ``faster`` is; None if either was not timed."""
    if slower not in times or faster not in times:
        return None
    return statistics.median(a / b for a, b in zip(times[slower], times[faster], strict=True))


def row(group: str, workload: Workload, name: str, times: dict[str, list[float]], **more: Any) -> dict[str, Any]:
    milliseconds = statistics.median(times[name])
    return {
        "group": group,
        **workload._asdict(),
        "call": name,
        "milliseconds": milliseconds,
        "tflops": workload.operations / milliseconds / 1e9,
        "against_fa3": ratio(times, "fa3", name),
        "against_dense": ratio(times, "dense", name),
        **more,
    }


def dense(workload: Workload, rounds: int) -> list[dict[str, Any]]:
    inputs = workload.inputs()
    calls = {"dense": dense_call(inputs, workload.causal), **fa3_call(inputs, workload.causal)}
    times = measure(calls, workload, rounds)
    return [row("dense", workload, name, times) for name in times]


def tracking(workload: Workload, rounds: int) -> list[dict[str, Any]]:
    inputs = workload.inputs()
    fresh = all_blocks(ceil_div(workload.tokens, BLOCK_K), "cuda")
    mask = fresh.repeat(workload.batch, workload.heads, ceil_div(workload.tokens, TILE_Q), 1)
    calls = {"dense": dense_call(inputs), **fa3_call(inputs)}
    calls |= {rule: tracking_call(inputs, mask, rule) for rule in ("running_max", "mass")}
    times = measure(calls, workload, rounds)
    assert (mask == fresh).all(), "a block was cleared while tracking was timed"
    return [row("tracking", workload, name, times) for name in ("running_max", "mass")]


def skipping(
    group: str, workload: Workload, rounds: int, masks: dict[str, tuple[Tensor, dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Rows of a group, one for each mask, with what is known of the mask."""
    inputs = workload.inputs()
    calls = {"dense": dense_call(inputs), **fa3_call(inputs)}
    calls |= {name: tracking_call(inputs, mask, "running_max") for name, (mask, _) in masks.items()}
    before = {name: mask.clone() for name, (mask, _) in masks.items()}
    times = measure(calls, workload, rounds)
    rows = []
    for name, (mask, known) in masks.items():
        assert torch.equal(mask, before[name]), "a block was cleared while skipping was timed"
        skipped = 1 - unpack_bits(mask, ceil_div(workload.tokens, BLOCK_K)).double().mean().item()
        result = row(group, workload, name, times, **known, skipped=skipped)
        rows.append(result | {"of_ideal": result["against_dense"] * (1 - skipped)})
    return rows


def sparse(workload: Workload, rounds: int) -> list[dict[str, Any]]:
    masks = {
        f"{share} by {run}": (random_mask(workload, share, run), {"share": share, "run": run})
        for share, run in itertools.product(SHARES, RUNS)
    }
    return skipping("sparse", workload, rounds, masks)


def skewed(workload: Workload, rounds: int) -> list[dict[str, Any]]:
    masks: dict[str, tuple[Tensor, dict[str, Any]]] = {
        f"{share} skewed": (random_mask(workload, share, 1, skew=1.0), {}) for share in SKEWED_SHARES
    }
    return skipping("skewed", workload, rounds, masks)


def summaries(workload: Workload, rounds: int) -> list[dict[str, Any]]:
    inputs = workload.inputs()
    _, key, value = inputs
    calls = {"dense": dense_call(inputs), "summaries alone": lambda: summarize_blocks(key, value, None)}
    for share in SUMMARIZED_SHARES:
        mask = random_mask(workload, share, 1)
        calls[f"{share} by mass"] = restoring_call(inputs, mask, "mass")
        for what, threshold in COMES_BACK.items():
            calls[f"{share}, {what} comes back"] = restoring_call(inputs, mask, "mass_summaries", threshold)
    times = measure(calls, workload, rounds)
    rows = [
        row("summaries", workload, "summaries alone", times, share_of_dense=ratio(times, "summaries alone", "dense"))
    ]
    for share in SUMMARIZED_SHARES:
        without = f"{share} by mass"
        rows.append(row("summaries", workload, without, times, share=share))
        for what in COMES_BACK:
            name = f"{share}, {what} comes back"
            rounds_of = zip(times[name], times[without], times["dense"], strict=True)
            cost = statistics.median((a - b) / dense for a, b, dense in rounds_of)
            rows.append(row("summaries", workload, name, times, share=share, comes_back=what, share_of_dense=cost))
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    def cell(value: float | None, form: str = ".3f") -> str:
        return "" if value is None else format(value, form)

    print("| group | head dim | tokens × heads | call | skipped | ms | TFLOP/s | vs FA3 | vs dense | of ideal | cost |")
    print("|---" * 11 + "|")
    for r in rows:
        workload = Workload(*(r[name] for name in Workload._fields))
        tflops = "" if r["group"] in ("sparse", "skewed", "summaries") else f"{r['tflops']:.0f}"
        print(
            f"| {r['group']} | {r['head_dim']} | {workload} | {r['call']} | {cell(r.get('skipped'))} "
            f"| {r['milliseconds']:.3f} | {tflops} | {cell(r['against_fa3'])} | {cell(r['against_dense'])} "
            f"| {cell(r.get('of_ideal'))} | {cell(r.get('share_of_dense'), '.4f')} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), default=list(GROUPS), metavar="GROUP", help="groups")
    parser.add_argument("--quick", action="store_true", help="only the first shape of each group, two rounds")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that ratios are the median of")
    parser.add_argument("--out", type=Path, default=DIRECTORY, help="folder for forward_time.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("forward_time: expected a CUDA device, found none")
    if flash_attention_3() is None:
        print("fa3-fwd is not installed: only own times")

    rounds = min(args.rounds, 2) if args.quick else args.rounds
    measures = {"dense": dense, "tracking": tracking, "sparse": sparse, "skewed": skewed, "summaries": summaries}
    work = [(group, workload) for group in args.only for workload in GROUPS[group][: 1 if args.quick else None]]
    rows = [r for group, workload in tqdm(work, unit="shape") for r in measures[group](workload, rounds)]
    setup = {"dtype": str(DTYPE).removeprefix("torch."), "rounds": rounds, "quick": args.quick, "groups": args.only}
    write_result("forward_time", setup, rows, args.out)
    print_table(rows)


if __name__ == "__main__":
    main()
