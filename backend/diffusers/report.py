"""What was skipped in a generation: by step, layer and guidance branch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Report:
    """Shares of (query tile, key block) pairs that were skipped in the last generation, or the one that runs.

    Attributes:
        layers: names of the layers, transformer first.
        reasons: why attention was dense although skipping was asked for, if it was.
    """

    def __init__(self, layers: list[str]) -> None:
        self.layers = layers
        self.reasons: set[str] = set()
        self._shares: dict[str, list[dict[str, Tensor | float]]] = {}

    def add(self, layer: str, branch: str, step: int, share: Tensor | float) -> None:
        """Note what a layer skipped; a tensor stays on its device until it is asked for."""
        steps = self._shares.setdefault(branch, [])
        steps.extend({} for _ in range(step + 1 - len(steps)))
        steps[step][layer] = share

    def clear(self) -> None:
        """Begin anew."""
        self._shares.clear()
        self.reasons.clear()

    @property
    def branches(self) -> list[str]:
        """Names of the guidance branches, as the pipeline calls them."""
        return list(self._shares)

    def sparsity(self, branch: str) -> Tensor:
        """Shares skipped in a branch, (steps, layers) float32 on the CPU; NaN where a layer did not run."""
        steps = self._shares[branch]
        rows = [[float(step.get(layer, math.nan)) for layer in self.layers] for step in steps]
        return torch.tensor(rows, dtype=torch.float32, device="cpu").view(len(steps), len(self.layers))

    @property
    def mean_sparsity(self) -> float:
        """Mean over all that ran; 0 before anything did."""
        shares = [self.sparsity(branch).flatten() for branch in self.branches]
        return float(torch.cat(shares).nanmean()) if shares else 0.0

    def plot(self, path: str | Path | None = None) -> Figure:
        """A heat map for each branch, layers over steps; saved if a path is given. Needs matplotlib."""
        from matplotlib.figure import Figure

        branches = self.branches
        figure = Figure(figsize=(max(4.0, 4.5 * len(branches)), 4.0), layout="constrained")
        for column, branch in enumerate(branches):
            axes = figure.add_subplot(1, len(branches), column + 1)
            image = axes.imshow(self.sparsity(branch).T.numpy(), aspect="auto", origin="lower", vmin=0.0, vmax=1.0)
            axes.set(title=branch, xlabel="step", ylabel="layer")
            if column == len(branches) - 1:
                figure.colorbar(image, ax=axes, label="share of blocks skipped")
        if path is not None:
            figure.savefig(path)
        return figure

    def __repr__(self) -> str:
        steps = max(map(len, self._shares.values()), default=0)
        reasons = f", dense: {'; '.join(sorted(self.reasons))}" if self.reasons else ""
        return f"Report({len(self.layers)} layers, {steps} steps, {self.mean_sparsity:.1%} skipped{reasons})"
