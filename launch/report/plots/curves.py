"""Curves over a run, and the runs of an arm as one curve with its spread."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from launch.report.plots.canvas import Dash
from launch.report.record import Record

MOST_POINTS = 1000

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """[points] each. low, high: the least and the most of the seeds."""

    x: Array
    mean: Array
    low: Array
    high: Array
    seeds: int

    def thinned(self) -> Curve:
        """At most MOST_POINTS of the points, the last one among them."""
        some = slice((len(self.x) - 1) % (step := math.ceil(len(self.x) / MOST_POINTS)), None, step)
        return Curve(self.x[some], self.mean[some], self.low[some], self.high[some], self.seeds)

    def line(self, axes: Axes, colour: str, dash: Dash, marker: str = "", width: float = 1.3) -> None:
        """The mean as a line, the seeds' spread as a band."""
        some = self.thinned()
        axes.plot(some.x, some.mean, color=colour, linestyle=dash, linewidth=width, marker=marker, markersize=4)
        if self.seeds > 1:
            axes.fill_between(some.x, some.low, some.high, color=colour, alpha=0.18, linewidth=0)

    def dots(self, axes: Axes, colour: str, *, hollow: bool = False) -> None:
        """The means as dots, the seeds' spread as bars."""
        axes.errorbar(
            self.x, self.mean, yerr=(self.mean - self.low, self.high - self.mean) if self.seeds > 1 else None,
            color=colour, marker="o", markersize=4.5, linestyle="none", capsize=2,
            markerfacecolor="none" if hollow else colour,
        )  # fmt: skip


def over_seeds(
    records: Sequence[Record],
    x: Callable[[Record], Mapping[int, float]],
    y: Callable[[Record], Mapping[int, float]],
) -> Curve | None:
    """`y` against `x`, each by step, over the steps that all runs with any value share; None without one.

    Where the runs of an arm are at different steps, its curve ends with the shortest: the mean never jumps because a
    run drops out of it.
    """
    values = [(x(record), finite(y(record))) for record in records]
    values = [(places, heights) for places, heights in values if heights]
    if not values:
        return None
    steps = sorted(set.intersection(*(set(places.keys() & heights.keys()) for places, heights in values)))
    if not steps:
        return None
    return curve([[places[step] for step in steps] for places, _ in values],
                 [[heights[step] for step in steps] for _, heights in values])  # fmt: skip


def curve(x: Sequence[Sequence[float]], y: Sequence[Sequence[float]]) -> Curve:
    """Of [seeds][points]."""
    places, heights = np.array(x, np.float64), np.array(y, np.float64)
    low, high = heights.min(0), heights.max(0)
    # a mean of equal numbers may be rounded to beside them
    return Curve(places.mean(0), heights.mean(0).clip(low, high), low, high, len(heights))


def finite(values: Mapping[int, float]) -> dict[int, float]:
    return {step: value for step, value in values.items() if math.isfinite(value)}


def smooth(values: Sequence[float]) -> Array:
    """Mean over the neighbours within a fortieth of the run on either side, as far as there are any."""
    reach = len(values) // 40
    total = np.concatenate(([0.0], np.cumsum(values)))
    at = np.arange(len(values))
    low, high = np.maximum(at - reach, 0), np.minimum(at + reach + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def smoothed(values: Mapping[int, float]) -> dict[int, float]:
    """By step; what is not finite is left out."""
    known = finite(values)
    return dict(zip(known, map(float, smooth(list(known.values()))), strict=True))


def tokens(record: Record) -> dict[int, float]:
    """Consumed by each step."""
    return {line["step"]: float(line["tokens"]) for line in record.steps}


def seconds(record: Record) -> dict[int, float]:
    """Spent by each step on steps and saves, from the first step on; validation and start-up are not in the metrics."""
    saves = {line["step"]: line["seconds_save"] for line in record.saves}
    spent = (
        math.fsum(value for key, value in line.items() if key.startswith("seconds_")) + saves.get(line["step"], 0.0)
        for line in record.steps
    )
    return dict(zip((line["step"] for line in record.steps), itertools.accumulate(spent), strict=True))
