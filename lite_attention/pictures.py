"""Pictures of what was skipped, for `Report.plot`, the command `lite-attention plot` and the benchmarks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from lite_attention.report import MaskOf
from lite_attention.tiles import BLOCK_K, TILE_Q

if TYPE_CHECKING:
    from lite_attention.report import Report

SKIPPED = "share of blocks skipped"
DID_NOT_RUN = "#c8c8c8"
VISITED = LinearSegmentedColormap.from_list("visited", ["#eef1f5", "#7fa3cf", "#1f4e8c", "#0b2447"])


def draw(report: Report) -> Figure:
    """Of each branch a heat map of sparsity, layers over steps, and its mean over layers; below, kept masks.

    Raises:
        ValueError: nothing ran yet.
    """
    branches = report.branches
    if not branches:
        raise ValueError("report: expected one of a generation, got one in which nothing ran")
    rows = len({of.step for of in report.masks})
    columns = len({of.layer for of in report.masks})
    width = max(4.6 * len(branches) + 1.0, 2.4 * columns + 1.0, 6.0)
    heights = [2.6 + min(max(0.1 * len(report.layers), 1.4), 4.0), rows * (width - 1.0) / max(columns, 1)]
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    if rows:
        above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=heights, hspace=0.02)[:, 0]
        _draw_sparsity(above, report)
        _draw_masks(below, report)
    else:
        _draw_sparsity(figure, report)
    return figure


def heat_map(axes: Any, shares: Tensor, highest: float) -> Any:
    """Sparsity, (steps, layers), layers upwards over steps; returns the image, for a colour bar."""
    axes.set_facecolor(DID_NOT_RUN)  # where the share is NaN
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return axes.imshow(
        shares.T.numpy(), aspect="auto", interpolation="nearest", origin="lower", cmap="viridis", vmin=0.0, vmax=highest
    )


def scale(shares: list[Tensor]) -> float:
    """The end of a scale for these shares: their largest, up to the next tenth."""
    return max(math.ceil(10 * float(share.nan_to_num().max())) / 10 for share in shares) or 0.1


def _draw_sparsity(figure: Any, report: Report) -> None:
    shares = [report.sparsity(branch) for branch in report.branches]
    highest = scale(shares)
    panels = figure.subplots(2, len(shares), squeeze=False, sharex="col", sharey="row", height_ratios=(2, 1))
    for (above, below), branch, of_branch in zip(panels.T, report.branches, shares, strict=True):
        image = heat_map(above, of_branch, highest)
        above.set_title(f"branch {branch}: {of_branch.nanmean():.1%} skipped", fontsize=10)
        _line(below, of_branch)
    panels[0, 0].set_ylabel("layer")
    panels[1, 0].set(ylabel="skipped", ylim=(0, 1.4 * highest))  # room for the legend
    panels[1, 0].legend(fontsize=8, frameon=False, loc="upper left", ncols=2)
    _percent(figure.colorbar(image, ax=list(panels[0]), label=SKIPPED).ax)
    title = f"{report.title}: " if report.title else ""
    gaps = ", grey where it did not run" if any(of_branch.isnan().any() for of_branch in shares) else ""
    figure.suptitle(f"{title}what each layer skips at each step{gaps}", fontsize=11)


def _line(axes: Any, shares: Tensor) -> None:
    """Mean over the layers that ran, and how far they are apart."""
    missing = shares.isnan()
    steps = (~missing.all(1)).nonzero().flatten()
    lowest, highest = (shares.masked_fill(missing, math.inf).amin(1), shares.masked_fill(missing, -math.inf).amax(1))
    axes.fill_between(
        steps, lowest[steps], highest[steps], color="#7fa3cf", alpha=0.35, linewidth=0, label="all layers"
    )
    axes.plot(steps, shares.nanmean(1)[steps], color="#1f4e8c", marker="o", markersize=2.5, label="their mean")
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    _percent(axes)


def _percent(axes: Any) -> None:
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _draw_masks(figure: Any, report: Report) -> None:
    steps = sorted({of.step for of in report.masks})
    layers = sorted({of.layer for of in report.masks}, key=report.layers.index)
    panels = figure.subplots(len(steps), len(layers), squeeze=False, sharex=True, sharey=True)
    for line, step in zip(panels, steps, strict=True):
        for panel, layer in zip(line, layers, strict=True):
            mask = report.masks.get(MaskOf(layer, step))
            if mask is None:
                panel.axis("off")
                continue
            visits = mask.bits().float()
            image = panel.imshow(
                visits.mean(0).numpy(), aspect="auto", interpolation="nearest", cmap=VISITED, vmin=0.0, vmax=1.0
            )
            panel.set_box_aspect(1)
            panel.set_title(
                f"layer {report.layers.index(layer)} after step {step}: {1 - visits.mean():.0%} skipped", fontsize=8
            )
    for panel in panels[:, 0]:
        panel.set_ylabel(f"tile of {TILE_Q} queries", fontsize=9)
    for panel in panels[-1]:
        panel.set_xlabel(f"block of {BLOCK_K} keys", fontsize=9)
    _percent(figure.colorbar(image, ax=panels, label="heads that still visit", shrink=0.8).ax)
    figure.suptitle(f"Which blocks of keys each tile of queries still visits, branch {report.branches[0]}", fontsize=11)
