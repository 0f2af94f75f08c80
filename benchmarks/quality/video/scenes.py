"""Moving scenes with labels, drawn from a seed: objects before a panned, textured background, occluding each other.

A scene has a main object, whose shape, colour and motion the labels say, one object behind it and a smaller one before
it, of any kind. Positions are in units of half a frame, (-1, -1) to (1, 1); time goes from 0 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SHAPES = ("disc", "square", "triangle", "ring", "cross", "star")
COLOURS = {
    "red": (0.90, 0.16, 0.18),
    "orange": (0.98, 0.55, 0.10),
    "yellow": (0.97, 0.88, 0.20),
    "green": (0.18, 0.70, 0.28),
    "cyan": (0.15, 0.80, 0.85),
    "blue": (0.18, 0.32, 0.90),
    "purple": (0.58, 0.24, 0.78),
    "white": (0.96, 0.96, 0.96),
}
MOTIONS = ("drift", "bounce", "orbit", "swing", "spin", "pulse")
BACKGROUNDS = ("clouds", "stripes", "checks", "ripples")

LABELS = (len(SHAPES), len(COLOURS), len(MOTIONS), len(BACKGROUNDS))
"""Number of values of each label."""


def describe(labels: Tensor) -> str:
    """Labels (4,) in words."""
    shape, colour, motion, background = labels.tolist()
    return f"{list(COLOURS)[colour]} {SHAPES[shape]}, {MOTIONS[motion]}, {BACKGROUNDS[background]}"


def draw_labels(count: int, random: torch.Generator, held_out: bool = False) -> Tensor:
    """Labels, int64 (count, 4): combinations for training, or the 1 in 8 that are kept from it.

    Training has seen every value, and every pair of values, of a combination that is held out.
    """
    columns = [torch.randint(size, (count,), generator=random, device=random.device) for size in LABELS]
    shape, colour, motion, background = columns
    # A combination is held out where shape + colour + motion is a multiple of the number of colours.
    chosen = -(shape + motion) % len(COLOURS)
    colour = chosen if held_out else torch.where(colour == chosen, (colour + 1) % len(COLOURS), colour)
    return torch.stack((shape, colour, motion, background), 1)


@torch.no_grad()
def render(labels: Tensor, random: torch.Generator, frames: int, height: int, width: int) -> Tensor:
    """Clips of scenes with these labels, float32 (batch, 3, frames, height, width), -1 to 1.

    Args:
        labels: int64 (batch, 4), on the generator's device, where the clips are drawn.
        random: what the labels do not say comes from here; the same seed gives other scenes on another device.
        frames, height, width: of the clip; the same scenes at any size.
    """
    draw = _Draw(len(labels), random)
    time = torch.linspace(0, 1, frames, device=labels.device)
    y = (torch.arange(height, device=labels.device) + 0.5) * (2 / height) - 1
    x = (torch.arange(width, device=labels.device) + 0.5) * (2 / width) - 1
    pixels = torch.stack(torch.meshgrid(x, y, indexing="xy"))[:, None, None]
    pan = draw.uniform(-0.6, 0.6, 2).T[..., None] * time

    # What is far moves by less than what is near.
    image = _background(labels[:, 3], pixels + 0.5 * pan[..., None, None], draw)
    behind, before = (torch.stack([draw.integer(size) for size in LABELS[:3]]) for _ in range(2))
    for kind, smallest, largest in ((behind, 0.25, 0.4), (labels.T[:3], 0.35, 0.5), (before, 0.12, 0.2)):
        image = _paint(image, kind, draw.uniform(smallest, largest), pixels, pan, time, draw)
    return image * 2 - 1


class _Draw:
    """Random numbers for each scene of a batch."""

    def __init__(self, batch: int, random: torch.Generator) -> None:
        self.batch = batch
        self.random = random

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """(batch, *shape)."""
        numbers = torch.rand(self.batch, *shape, generator=self.random, device=self.random.device)
        return low + (high - low) * numbers

    def integer(self, below: int) -> Tensor:
        """(batch,)."""
        return torch.randint(below, (self.batch,), generator=self.random, device=self.random.device)

    def sign(self, *shape: int) -> Tensor:
        """-1 or 1, (batch, *shape)."""
        return self.uniform(-1, 1, *shape).sign()


def _background(labels: Tensor, points: Tensor, draw: _Draw) -> Tensor:
    """Image (batch, 3, frames, height, width), 0 to 1, of textures (batch,) at points (2, batch, frames, ...)."""
    x, y = points
    angle, phase = draw.uniform(0, math.pi), draw.uniform(0, 2 * math.pi)
    along = _spread(angle.cos()) * x + _spread(angle.sin()) * y
    across = _spread(angle.cos()) * y - _spread(angle.sin()) * x
    frequency = _spread(draw.uniform(4, 9))
    centre = draw.uniform(-0.8, 0.8, 2).T[..., None, None, None]
    waves = torch.zeros_like(along)
    for _ in range(6):
        direction = draw.uniform(-4, 4, 2).T[..., None, None, None]
        waves += (direction[0] * x + direction[1] * y + _spread(draw.uniform(0, 2 * math.pi))).sin() / 2
    stripes = (frequency * along + _spread(phase)).sin()
    textures = (
        waves,
        4 * stripes,
        6 * stripes * (frequency * across).sin(),
        4 * (frequency * (points - centre).norm(dim=0)).sin(),
    )
    level = _choose(textures, labels).sigmoid()[:, None]
    dark, bright = draw.uniform(0.05, 0.4, 3), draw.uniform(0.35, 0.75, 3)
    return _spread(dark) + _spread(bright - dark) * level


def _paint(image: Tensor, kind: Tensor, size: Tensor, pixels: Tensor, pan: Tensor, time: Tensor, draw: _Draw) -> Tensor:
    """The image with an object on it; ``kind`` is its shape, colour and motion, int64 (3, batch)."""
    shape, colour, motion = kind
    centre, angle, scale = _move(motion, time, draw)
    radius = (size[:, None] * scale)[..., None, None]
    offset = (pixels - (centre - pan)[..., None, None]) / radius
    cos, sin = angle.cos()[..., None, None], angle.sin()[..., None, None]
    x, y = cos * offset[0] + sin * offset[1], cos * offset[1] - sin * offset[0]
    distance = _choose(_distances(x, y), shape) * radius
    coverage = (0.5 - distance * (image.shape[-1] / 2)).clamp(0, 1)[:, None]
    # Stripes, dots or nothing on it, and light from one side.
    frequency = _spread(draw.uniform(5, 9))
    marks = _choose(((frequency * x).sin(), (frequency * x).sin() * (frequency * y).sin(), 0 * x), draw.integer(3))
    shade = 0.8 + 0.15 * (4 * marks).tanh() - 0.12 * offset.sum(0).clamp(-1, 1)
    palette = torch.tensor(list(COLOURS.values()), device=image.device)
    return image + coverage * ((_spread(palette[colour]) * shade[:, None]).clamp(0, 1) - image)


def _distances(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Signed distance (roughly) to the edge of each of `SHAPES`, negative inside, in units of the radius."""
    from_centre = (x.square() + y.square()).sqrt()
    triangle = torch.maximum(y, torch.maximum(-0.5 * y + 0.866 * x, -0.5 * y - 0.866 * x)) - 0.55
    horizontal = torch.maximum(x.abs() - 1, y.abs() - 0.32)
    vertical = torch.maximum(y.abs() - 1, x.abs() - 0.32)
    return (
        from_centre - 0.9,
        torch.maximum(x.abs(), y.abs()) - 0.8,
        triangle,
        (from_centre - 0.7).abs() - 0.25,
        torch.minimum(horizontal, vertical),
        (from_centre - 0.7 - 0.3 * (5 * torch.atan2(y, x)).cos()) * 0.7,
    )


def _move(motion: Tensor, time: Tensor, draw: _Draw) -> tuple[Tensor, Tensor, Tensor]:
    """Centre (2, batch, frames), angle and relative size (batch, frames) of objects that move each in its way."""
    turn = 2 * math.pi * time
    start, way = draw.uniform(-0.5, 0.5, 2).T[..., None], draw.uniform(0, 2 * math.pi)[:, None]
    direction = torch.stack((way.cos(), way.sin()))
    sign, phase = draw.sign()[:, None], draw.uniform(0, 2 * math.pi)[:, None]
    circle = torch.stack(((sign * turn + phase).cos(), (sign * turn + phase).sin()))
    fast = start + direction * draw.uniform(2.0, 3.2)[:, None] * time
    pendulum = torch.stack((0.7 * (turn + phase).sin(), 0.3 * (turn + phase).cos().square() - 0.3))
    still = start.expand(-1, -1, len(time))
    centres = (
        0.4 * start + direction * draw.uniform(0.9, 1.5)[:, None] * (time - 0.5),
        # Reflected at the edges: a triangle wave between -0.7 and 0.7.
        (torch.remainder(fast + 0.7, 2.8) - 1.4).abs() - 0.7,
        0.3 * start + 0.5 * circle,
        pendulum + 0.3 * start,
        still,
        still,
    )
    rest = phase.expand(-1, len(time))
    tilt = 0.6 * (turn + phase).sin()
    angles = (rest, rest, rest, tilt, phase + sign * 1.5 * turn, rest)
    sizes = (*(torch.ones_like(rest),) * 5, 1 + 0.4 * (2 * turn + phase).sin())
    centre = torch.stack([_choose([of_motion[axis] for of_motion in centres], motion) for axis in range(2)])
    return centre, _choose(angles, motion), _choose(sizes, motion)


def _spread(numbers: Tensor) -> Tensor:
    """(batch, ...) as (batch, ..., 1, 1, 1), to be taken at every pixel of every frame."""
    return numbers[..., None, None, None]


def _choose(options: Sequence[Tensor], index: Tensor) -> Tensor:
    """Of each row of the batch the option that ``index`` (batch,) says."""
    return torch.stack(tuple(options), 1)[torch.arange(len(index), device=index.device), index]
