"""Lists of blocks to read, as scattered as real ones, for timings in which every share can be had."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lite_attention.tiles import ceil_div


def forced_bits(blocks: int, share: float) -> Tensor:
    """Which blocks a head reads, (blocks,) bool.

    A share drawn log-normally around the mean (sigma 0.5), in runs of one block or more (geometric, two on average) at
    uniformly random places; the first and the newest two blocks always.
    """
    bits = torch.zeros(blocks, dtype=torch.bool)
    wanted = round(blocks * min(1.0, share * math.exp(0.5 * float(torch.randn(())) - 0.125)))
    while (missing := wanted - int(bits.sum())) > 0:
        starts = torch.randint(blocks, (ceil_div(missing, 2),))
        lengths = torch.empty(len(starts)).geometric_(0.5)
        for more in range(int(lengths.max())):
            bits[(starts[lengths > more] + more).clamp(max=blocks - 1)] = True
    bits[0] = True
    bits[-2:] = True
    return bits
