"""Lists of blocks to read, as scattered as real ones, for timings in which every share can be had."""

from __future__ import annotations

import torch
from torch import Tensor

from lite_attention.tiles import ceil_div


def forced_lists(lists: int, blocks: int, share: float) -> Tensor:
    """Which blocks so many heads read, (lists, blocks) bool.

    The share of each is drawn log-normally (sigma 0.5), all scaled so that their mean is `share`. Blocks come in runs
    of one or more (geometric, two on average) at uniformly random places; the first and the newest two always.
    """
    factors = torch.exp(0.5 * torch.randn(lists))
    return torch.stack([_one(blocks, share * factor) for factor in (factors / factors.mean()).tolist()])


def let_no_estimate_pass(summaries: Tensor) -> None:
    """So that a row reads its list alone: the scales of all summaries become no numbers."""
    summaries[..., -16:] = 255


def _one(blocks: int, share: float) -> Tensor:
    bits = torch.zeros(blocks, dtype=torch.bool)
    bits[0] = True
    bits[-2:] = True
    wanted = round(blocks * min(1.0, share))
    while (missing := wanted - int(bits.sum())) > 0:
        starts = torch.randint(blocks, (ceil_div(missing, 2),))
        lengths = torch.empty(len(starts)).geometric_(0.5)
        for more in range(int(lengths.max())):
            bits[(starts[lengths > more] + more).clamp(max=blocks - 1)] = True
    return bits
