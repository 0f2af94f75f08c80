"""Picture of what skipping costs in text, from the kept run of `benchmarks.quality.text.evaluate`.

KL divergence to dense decoding and the share of equal most likely tokens, against the share of the KV cache that is
read, one line for each length of the prompt (docs/text_quality.png).

    python -m benchmarks.quality.text.plot
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from benchmarks.results import DIRECTORY

DOCS = Path(__file__).parents[3] / "docs"


def curves(rows: list[dict[str, Any]], title: str) -> Figure:
    """Both measures against the share read; the points say their thresholds."""
    figure, (divergence, same) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for context in sorted({row["context"] for row in rows}):
        points = sorted((row for row in rows if row["context"] == context), key=lambda row: row["read"])
        read = [row["read"] for row in points]
        (line,) = divergence.plot(read, [row["kl"] for row in points], marker="o", label=f"{context:,} tokens")
        same.plot(read, [row["top1"] for row in points], marker="o", color=line.get_color())
        for row in points:
            place = (row["read"], row["kl"])
            divergence.annotate(f"{row['threshold']:g}", place, (3, 3), textcoords="offset points", fontsize=7)
    divergence.axhline(0.01, color="grey", linewidth=0.8, linestyle=":")
    divergence.set(yscale="log", ylabel="mean KL divergence to dense decoding")
    divergence.legend(title="behind")
    same.set(ylabel="same most likely token")
    same.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for panel in (divergence, same):
        panel.set(xlabel="share of the KV cache read, summaries included")
        panel.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        panel.grid(alpha=0.3)
    figure.suptitle(title)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, default=DIRECTORY / "text_quality.json", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=DOCS / "text_quality.png", help="default: %(default)s")
    args = parser.parse_args()
    kept = json.loads(args.result.read_text())
    setup = kept["setup"]
    title = f"{setup['model']}: {', '.join(setup['texts'])}, {setup['steps']} teacher-forced steps each"
    curves(kept["rows"], title).savefig(args.out, dpi=110)
    print(f"Written: {args.out}")


if __name__ == "__main__":
    main()
