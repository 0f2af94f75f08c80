"""The picture of how speed grows with the share of blocks skipped, from the kept run of forward_time.

python -m benchmarks.plot_forward --output docs/forward_speed.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.forward_time import Workload
from benchmarks.results import DIRECTORY


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, default=DIRECTORY / "forward_time.json")
    parser.add_argument("--output", type=Path, default=Path("docs/forward_speed.png"))
    args = parser.parse_args()

    result = json.loads(args.result.read_text())
    curves: dict[tuple[Workload, int], list[tuple[float, float]]] = {}
    for row in result["rows"]:
        if row["group"] == "sparse":
            workload = Workload(*(row[name] for name in Workload._fields))
            curves.setdefault((workload, row["run"]), [(0.0, 1.0)]).append((row["skipped"], row["against_dense"]))

    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    shares = np.linspace(0, max((share for curve in curves.values() for share, _ in curve), default=0.9), 200)
    axes.plot(shares, 1 / (1 - shares), color="black", linewidth=1, label="ideal, 1 / (1 - share)")
    colours = {workload: f"C{i}" for i, workload in enumerate(dict.fromkeys(workload for workload, _ in curves))}
    for (workload, run), curve in curves.items():
        style, chosen = ("-", "one by one") if run == 1 else ("--", f"in runs of {run}")
        axes.plot(*zip(*sorted(curve), strict=True), style, marker="o", markersize=3.5, color=colours[workload],
                  label=f"{workload}, {chosen}")  # fmt: skip
    axes.set_yscale("log", base=2)
    axes.set_yticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axes.set_xlabel("share of blocks skipped")
    axes.set_ylabel("speed against no skipping")
    axes.set_title(f"tokens × heads, {result['setup']['dtype']}, one {result['machine']['processor']}", fontsize=10)
    axes.legend(fontsize=8)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=110)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
