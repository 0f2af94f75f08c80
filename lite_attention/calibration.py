"""Thresholds that cost what a user allows, one for each layer: how they are found, and the file that keeps them.

Layers differ: the same threshold may cost one layer nothing and another its picture. So what skipping costs is measured
layer by layer, against dense attention of the very same inputs, while a model runs; and the thresholds are moved until
each layer's cost is the one that was asked for.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, cast, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lite_attention.costs import Cost, DecodeShape, Meter, Shape
from lite_attention.options import Rule

Quantity = Literal["error", "dropped", "sparsity"]
"""What is kept at its target; see `Cost`."""

LOWEST = -30.0
HIGHEST = -0.125
ROUNDS = 10
"""Runs of the model at most."""

TOLERANCE = 0.1
"""How far from the target, relative to it, a layer may be when the search ends."""


class Target(NamedTuple):
    """What a layer's cost is to be."""

    quantity: Quantity
    value: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads ``error=0.05``, ``dropped=0.01`` or ``sparsity=0.5``.

        Raises:
            ValueError: it is something else, or the number is not between 0 and 1.
        """
        quantity, _, number = text.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if quantity not in get_args(Quantity) or not 0.0 < value < 1.0:
            expected = ", ".join(f"{name}=NUMBER" for name in get_args(Quantity))
            raise ValueError(f"target: expected one of {expected}, a number between 0 and 1, got {text!r}")
        return cls(cast(Quantity, quantity), value)

    def distance(self, cost: Cost) -> float:
        """How many doublings a cost is below the target; of shares, of their odds."""
        return _log(self.quantity, self.value) - _log(self.quantity, getattr(cost, self.quantity))


def _log(quantity: Quantity, value: float) -> float:
    if quantity == "error":
        return math.log2(max(value, 1e-12))
    value = min(max(value, 1e-12), 1 - 1e-12)
    return math.log2(value / (1.0 - value))


class _Calibration(BaseModel):
    """Thresholds of a model's layers, and how they were found; kept in a TOML file.

    Attributes:
        model: what it was found on, as the user called it.
        inputs: on which inputs, likewise.
        quantity, target: what each layer's cost was to be.
        refresh_interval: every so many steps all blocks are visited; 0 for never.
        reached: each layer's cost in the last run.
        thresholds: of each layer.
        stage: which operator the layers call.
        shape: of the attention that they hold for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    model: str
    inputs: str
    quantity: Quantity
    target: float
    refresh_interval: Annotated[int, Field(ge=0)]
    thresholds: dict[str, Annotated[float, Field(le=0)]]
    reached: dict[str, Cost]
    stage: Literal["forward", "decode"]
    shape: Shape | DecodeShape

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads a file.

        Raises:
            OSError: it cannot be read.
            ValueError: it is no calibration, with what is wrong in it.
        """
        try:
            return cls.model_validate(tomllib.loads(Path(path).read_text()))
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"calibration {path}: expected TOML, got {error}") from None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"]))
            got = "nothing" if first["type"] == "missing" else repr(first["input"])
            raise ValueError(f"calibration {path}: {place}: {first['msg']}, got {got}") from None

    def save(self, path: str | Path) -> None:
        """Writes the file."""
        import tomli_w

        Path(path).write_text("# Written by `lite-attention calibrate`.\n" + tomli_w.dumps(self.model_dump()))

    def check_layers(self, layers: Iterable[str]) -> None:
        """Raises ValueError unless these are the layers of the model that this was found on."""
        missing = sorted(set(layers) ^ set(self.thresholds))
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(
                f"calibration: expected the layers of {self.model}, which is what it was made for, got a model that "
                f"differs in {missing[0]}{more}"
            )

    def check_shape(self, shape: Shape | DecodeShape) -> None:
        """Raises ValueError unless a model is of the shape that this was found for."""
        if shape != self.shape:
            raise ValueError(f"calibration: expected {self.shape}, as it was made for ({self.model}), got {shape}")

    @property
    def mean_threshold(self) -> float:
        """Mean over the layers that skip; -inf where none does."""
        finite = [threshold for threshold in self.thresholds.values() if threshold > -math.inf]
        return sum(finite) / len(finite) if finite else -math.inf

    def mean(self) -> Cost:
        """What was reached, mean over the layers."""
        costs = [astuple(cost) for cost in self.reached.values()]
        return Cost(*(sum(numbers) / len(costs) for numbers in zip(*costs, strict=True)))


class Calibration(_Calibration):
    """For the denoising steps of a model, `lite_attention.LiteAttention`; a profile of a server.

    Attributes:
        rule: how layers skip.
        shape: of the attention of each layer.
    """

    stage: Literal["forward"] = "forward"
    rule: Rule
    shape: Shape


class DecodeCalibration(_Calibration):
    """For the decode steps of a language model; a profile of a server.

    Attributes:
        shape: of the model.
    """

    stage: Literal["decode"]
    shape: DecodeShape


def search(
    measure: Callable[[Mapping[str, float]], Mapping[str, Cost]],
    layers: Iterable[str],
    target: Target,
    start: float = -8.0,
) -> tuple[dict[str, float], Mapping[str, Cost]]:
    """Find thresholds at which each layer's cost is the target.

    All layers are moved at once, each by its own secant: log2 of the cost grows about linearly with the threshold. A
    layer that cannot cost as much as the target ends at the highest threshold, one that cannot cost as little at the
    lowest.

    Args:
        measure: runs the model with thresholds by layer and returns what they cost; called `ROUNDS` times at most.
        layers: their names.
        start: the thresholds of the first run.

    Returns:
        The thresholds of the run that came nearest to the target, judged by its worst layer, and the costs of that run.
    """
    thresholds = dict.fromkeys(layers, start)
    seen: dict[str, list[tuple[float, float]]] = {layer: [] for layer in thresholds}
    best: tuple[float, dict[str, float], Mapping[str, Cost]] | None = None
    for _ in range(ROUNDS):
        costs = measure(thresholds)
        distances = {layer: target.distance(costs[layer]) for layer in thresholds}
        movable = [layer for layer in thresholds if _movable(thresholds[layer], distances[layer])]
        worst = max((abs(distances[layer]) for layer in movable), default=0.0)
        if best is None or worst < best[0]:
            best = worst, thresholds, costs
        if worst < math.log2(1.0 + TOLERANCE):
            break
        for layer, threshold in thresholds.items():
            seen[layer].append((threshold, distances[layer]))
        thresholds = {layer: _next(points) for layer, points in seen.items()}
    assert best is not None
    return best[1], best[2]


def _next(points: list[tuple[float, float]]) -> float:
    """Where a layer may be at its target, from (threshold, distance) of the runs so far."""
    threshold, distance = points[-1]
    if abs(distance) < math.log2(1.0 + TOLERANCE):
        return threshold
    slope = 1.0
    if len(points) > 1 and abs(threshold - points[-2][0]) > 1e-3:
        slope = min(max((points[-2][1] - distance) / (threshold - points[-2][0]), 0.25), 4.0)
    moved = threshold + min(max(distance / slope, -4.0), 4.0)
    # Between the nearest of those that cost too little and too much, as long as costs grow with the threshold.
    low = max((at for at, distance in points if distance > 0), default=LOWEST)
    high = min((at for at, distance in points if distance < 0), default=HIGHEST)
    if LOWEST < low < high < HIGHEST and not low < moved < high:
        moved = (low + high) / 2
    return min(max(moved, LOWEST), HIGHEST)


def _movable(threshold: float, distance: float) -> bool:
    """Whether there is room for a threshold nearer to the target."""
    return threshold < HIGHEST if distance > 0 else threshold > LOWEST


def find(
    measure: Callable[[Mapping[str, float]], Mapping[str, Cost]],
    meters: Mapping[str, Meter],
    target: Target,
    *,
    model: str,
    inputs: str,
    rule: Rule,
    refresh_interval: int,
) -> Calibration:
    """As `search`, its result with everything that the file says.

    Raises:
        ValueError: a layer did not run, or layers differ in shape.
    """
    thresholds, reached = search(measure, meters, target)
    shapes = {meter.shape for meter in meters.values()}
    if None in shapes:
        idle = next(layer for layer, meter in meters.items() if meter.shape is None)
        raise ValueError(f"calibration: expected every layer to run and to skip, {idle} did not")
    if len(shapes) > 1:
        raise ValueError(f"calibration: expected layers of one shape, got {' and '.join(sorted(map(str, shapes)))}")
    details: dict[str, Any] = {"quantity": target.quantity, "target": target.value}
    return Calibration(
        model=model,
        inputs=inputs,
        **details,
        rule=rule,
        refresh_interval=refresh_interval,
        shape=cast(Shape, shapes.pop()),
        thresholds=rounded(thresholds),
        reached=dict(reached),
    )


def rounded(thresholds: Mapping[str, float]) -> dict[str, float]:
    """As a file keeps them."""
    return {layer: round(threshold, 4) for layer, threshold in thresholds.items()}
