"""Whether calibration keeps its promise on inputs that it was not made on: what the benchmarks of all models report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lite_attention.calibration import Target
from lite_attention.costs import Cost

Row = dict[str, Any]

RELATIVE = 0.25
"""How far from its target, relative to it, what is reached may be."""


def compare(
    target: Target, thresholds: Mapping[str, float], reached: Mapping[str, Cost], held_out: Mapping[str, Cost]
) -> Row:
    """A target, what calibration reached and what its thresholds cost in held-out inputs: means over layers, and each.

    `layers_within` is the share of layers whose cost in held-out inputs is within `RELATIVE` of the target.
    """
    costs = {layer: getattr(cost, target.quantity) for layer, cost in held_out.items()}
    off = {layer: cost / target.value - 1 for layer, cost in costs.items()}
    return {
        "quantity": target.quantity,
        "target": target.value,
        "reached": _mean([getattr(cost, target.quantity) for cost in reached.values()]),
        "held_out": _mean(list(costs.values())),
        "layers_within": _mean([float(abs(part) <= RELATIVE) for part in off.values()]),
        "sparsity": _mean([cost.sparsity for cost in held_out.values()]),
        "thresholds": dict(thresholds),
        "held_out_by_layer": costs,
    }


def print_rows(rows: Sequence[Row]) -> None:
    """The figures as a table in Markdown."""
    print("| target | reached | held out | off by | layers within 25 % | sparsity, held out |\n" + "|---" * 6 + "|")
    for row in rows:
        print(
            f"| {row['quantity']} = {row['target']:g} | {row['reached']:.4f} | {row['held_out']:.4f} "
            f"| {row['held_out'] / row['target'] - 1:+.0%} | {row['layers_within']:.0%} | {row['sparsity']:.3f} |"
        )


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)
