"""Whether calibration keeps its promise on inputs that it was not made on: what the benchmarks of all models report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.markdown import table
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
    columns = ["target", "reached", "held out", "off by", "layers within 25 %", "sparsity, held out"]
    figures = (
        [
            f"{row['quantity']} = {row['target']:g}",
            f"{row['reached']:.4f}",
            f"{row['held_out']:.4f}",
            f"{row['held_out'] / row['target'] - 1:+.0%}",
            f"{row['layers_within']:.0%}",
            f"{row['sparsity']:.3f}",
        ]
        for row in rows
    )
    print(table(columns, figures))


def calibration_table(result: dict[str, Any], caption: str, held_out: str, digits: int) -> str:
    """A kept result of such rows for readers: what the inputs that count are called, and digits of costs."""
    within = f"layers within {result['setup']['within']:.0%} of it"
    return table(
        ["target", "reached", held_out, within, "blocks skipped"],
        (
            [
                f"{row['quantity']} = {row['target']:g}",
                f"{row['reached']:.{digits}f}",
                f"{row['held_out']:.{digits}f}",
                f"{row['layers_within']:.0%}",
                f"{row['sparsity']:.0%}",
            ]
            for row in result["rows"]
        ),
        caption,
    )


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)
