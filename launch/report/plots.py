"""The pictures of a comparison. An arm has one colour in all of them; what no run measured is not drawn."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, NullLocator
from numpy.typing import NDArray

from launch.report.compare import Arm, Comparison, Spread
from launch.report.quantities import load_balance
from launch.report.record import Record
from launch.report.show import compact, shown

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Told apart by colour-blind readers too (Okabe and Ito, Color Universal Design)."""

DASHES = ("solid", "dashed", "dotted", "dashdot")
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "text.parse_math": False,  # a name may hold a dollar sign
}
SIZE, DPI = (5.6, 3.7), 200  # inches: small, so that the text can still be read at the width of a phone
MOST_POINTS = 1000
SIDES = (
    ((9, 0), "left", "center"),
    ((0, 9), "center", "bottom"),
    ((0, -9), "center", "top"),
    ((-9, 0), "right", "center"),
)
"""Of a point, for its name: the offset, and how the name is aligned there."""


@dataclass(frozen=True)
class Plot:
    """paint: draws into the axes; False where no run has the numbers, and the plot is left out."""

    file: str
    title: str
    caption: str
    paint: Callable[[Comparison, Axes], bool]


def draw(comparison: Comparison) -> list[tuple[Plot, bytes]]:
    """Every plot that there are numbers for, with its PNG."""
    drawn = []
    with matplotlib.rc_context(STYLE):
        for plot in PLOTS:
            figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
            axes = figure.add_subplot()
            axes.set_axisbelow(True)
            if plot.paint(comparison, axes):
                axes.set_title(plot.title, loc="left", fontsize=11, fontweight="bold")
                buffer = io.BytesIO()
                figure.savefig(buffer, format="png")
                drawn.append((plot, buffer.getvalue()))
    return drawn


def smooth(values: list[float]) -> NDArray[np.float64]:
    """Mean over the neighbours within a fortieth of the run on either side, as far as there are any."""
    reach = len(values) // 40
    total = np.concatenate(([0.0], np.cumsum(values)))
    at = np.arange(len(values))
    low, high = np.maximum(at - reach, 0), np.minimum(at + reach + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def _loss(comparison: Comparison, axes: Axes) -> bool:
    ceilings: list[float] = []
    for colour, dash, record, label in _lines(comparison):
        if not record.steps:
            continue
        tokens = [line["tokens"] for line in record.steps]
        curve = smooth([line["loss"] for line in record.steps])
        some = slice(None, None, math.ceil(len(tokens) / MOST_POINTS))
        axes.plot(tokens[some], curve[some], color=colour, linestyle=dash, linewidth=1.2, alpha=0.75, label=label)
        points = [line for line in record.validations if math.isfinite(line["val_loss"])]
        at = {line["step"]: line["tokens"] for line in record.steps}
        axes.plot(
            [at[line["step"]] for line in points if line["step"] in at],
            [line["val_loss"] for line in points if line["step"] in at],
            color=colour, marker="o", markersize=4.5, linestyle="none",
        )  # fmt: skip
        # the first steps fall steeply from chance and would flatten everything that is worth seeing
        ceilings.append(float(np.max(curve[len(curve) // 10 :])))
    if not ceilings:
        return False
    if comparison.unigram_entropy is not None:
        axes.axhline(comparison.unigram_entropy, color="grey", linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            "knowing only how frequent each token is", (0.99, comparison.unigram_entropy), ha="right", color="grey",
            xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points", fontsize=8,
        )  # fmt: skip
        ceilings.append(comparison.unigram_entropy)
    axes.set_ylim(top=max(ceilings) * 1.08)
    axes.set_xlabel("training tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    axes.set_xlim(left=0)
    axes.legend(frameon=False, loc="best")
    return True


def _quality(comparison: Comparison, axes: Axes) -> bool:
    key, unit = _quality_axis(comparison)
    points: list[tuple[Arm, str, Spread, Spread]] = []
    for arm, colour, _ in styled(comparison):
        cache, quality = arm.quantities["kv_measured"], arm.quantities[key]
        if cache is not None and quality is not None and math.isfinite(quality.mean):
            points.append((arm, colour, cache, quality))
    if not points:
        return False
    for _, colour, cache, quality in points:
        axes.errorbar(cache.mean, quality.mean, yerr=quality.sd, color=colour, marker="o", markersize=9, capsize=4)
    sizes = sorted({cache.mean for _, _, cache, _ in points})
    smallest = min((size for size in sizes if size > 0), default=1.0)
    if sizes[0] > 0:
        axes.set_xscale("log", base=2)
    else:  # a cache that never grows has its place at zero
        axes.set_xscale("symlog", base=2, linthresh=smallest)
    axes.set_xlim(sizes[0] / 2 if sizes[0] > 0 else -smallest / 2, max(sizes[-1], smallest) * 2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.5g}"))
    axes.margins(y=0.25)
    axes.set_xlabel("decode cache: bytes for each further token (bf16, measured)")
    axes.set_ylabel(unit)
    _label_points(axes, [(arm.name, colour, cache.mean, quality.mean) for arm, colour, cache, quality in points])
    return True


def _quality_axis(comparison: Comparison) -> tuple[str, str]:
    """Bits per byte where all arms have text; else the accuracy, which is what a task without text is judged by."""
    if all(arm.quantities["val_bpb"] is not None for arm in comparison.arms):
        return "val_bpb", "held-out bits per byte"
    return "val_accuracy", "held-out accuracy (share of scored tokens)"


def _load(comparison: Comparison, axes: Axes) -> bool:
    found = False
    for colour, dash, record, label in _lines(comparison):
        points = [(line["tokens"], load) for line in record.steps if (load := load_balance(line)) is not None]
        if not points:
            continue
        found = True
        tokens, curve = [at for at, _ in points], smooth([load for _, load in points])
        some = slice(None, None, math.ceil(len(tokens) / MOST_POINTS))
        axes.plot(tokens[some], curve[some], color=colour, linestyle=dash, linewidth=1.4, label=label)
    if found:
        axes.axhline(1.0, color="grey", linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate("even", (0.99, 1.0), xycoords=("axes fraction", "data"), xytext=(0, 3),
                      textcoords="offset points", ha="right", color="grey", fontsize=8)  # fmt: skip
        axes.set_ylim(bottom=0.9)
        axes.set_xlim(left=0)
        axes.set_xlabel("training tokens")
        axes.set_ylabel("busiest expert ÷ mean load")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
        axes.legend(frameon=False, loc="best")
    return found


def _speed(comparison: Comparison, axes: Axes) -> bool:
    names: list[str] = []
    for arm, colour, _ in styled(comparison):
        rates = [line["tokens_per_second"] for record in arm.records for line in record.steps]
        median = arm.quantities["tokens_per_second"]
        if not rates or median is None:
            continue
        low, high = statistics.quantiles(rates, n=4)[::2] if len(rates) > 1 else (rates[0], rates[0])
        axes.barh(len(names), median.mean, color=colour, height=0.6)
        axes.plot([low, high], [len(names)] * 2, color="black", linewidth=1.2, alpha=0.6)
        axes.annotate(shown(median.mean, "count"), (max(high, median.mean), len(names)), xytext=(6, 0),
                      textcoords="offset points", va="center")  # fmt: skip
        names.append(arm.name)
    if not names:
        return False
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.margins(x=0.15)
    axes.set_xlabel("tokens per second, all ranks")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    return True


def styled(comparison: Comparison) -> Iterator[tuple[Arm, str, str]]:
    """Each arm with its colour and its dash, which begin anew together only after all pairs are used."""
    for index, arm in enumerate(comparison.arms):
        yield arm, COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)]


def _lines(comparison: Comparison) -> Iterator[tuple[str, str, Record, str | None]]:
    """Each run in its arm's style; the first run of an arm carries the label."""
    for arm, colour, dash in styled(comparison):
        for index, record in enumerate(arm.records):
            yield colour, dash, record, arm.name if index == 0 else None


def _label_points(axes: Axes, points: list[tuple[str, str, float, float]]) -> None:
    """A name beside each point (name, colour, x, y), on the first side where it covers no other name."""
    placed: list[Annotation] = []
    for name, colour, x, y in points:
        for offset, horizontal, vertical in SIDES:
            text = axes.annotate(
                name, (x, y), xytext=offset, textcoords="offset points", ha=horizontal, va=vertical,
                color=colour, fontweight="bold",
            )  # fmt: skip
            if not any(text.get_window_extent().overlaps(other.get_window_extent()) for other in placed):
                break
            if (offset, horizontal, vertical) != SIDES[-1]:
                text.remove()
        placed.append(text)


PLOTS = (
    Plot("loss.png", "Loss over training", "Lines: training, smoothed. Dots: held-out.", _loss),
    Plot("quality.png", "Quality against cache", "What a scheme's cache costs, and what quality it buys.", _quality),
    Plot("load.png", "Expert load", "The busiest expert's load ÷ the mean, over all layers, smoothed.", _load),
    Plot("speed.png", "Throughput", "Median over the steps; the thin line spans the middle half of them.", _speed),
)
