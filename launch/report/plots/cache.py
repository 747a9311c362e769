"""What a scheme's cache costs, and what quality it buys."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from launch.report.compare import Arm, Comparison, Spread
from launch.report.plots.canvas import MOST_NAMES, Ink, legend, short, styled
from launch.report.show import spread

SIDES = (
    ((9, 0), "left", "center"),
    ((0, 9), "center", "bottom"),
    ((0, -9), "center", "top"),
    ((-9, 0), "right", "center"),
)
"""Of a point, for its name: the offset, and how the name is aligned there."""


def quality_against_cache(comparison: Comparison, figure: Figure, ink: Ink) -> str | None:
    """Held-out bits per byte where all arms have text; else the accuracy, which a task without text is judged by."""
    axes = figure.add_subplot()
    validated = [arm for arm in comparison.arms if arm.quantities["val_accuracy"] is not None]
    is_text = all(arm.quantities["val_bpb"] is not None for arm in validated)
    key, kind, unit = (
        ("val_bpb", "loss", "held-out bits per byte") if is_text else ("val_accuracy", "percent", "held-out accuracy")
    )
    points: list[tuple[Arm, str, Spread, Spread]] = []
    for arm, colour, _ in styled(comparison, ink):
        cache, quality = arm.quantities["kv_measured"], arm.quantities[key]
        if cache is not None and quality is not None and math.isfinite(quality.mean):
            points.append((arm, colour, cache, quality))
    if not points:
        return None
    for _, colour, cache, quality in points:
        axes.errorbar(cache.mean, quality.mean, yerr=quality.sd, color=colour, marker="o", markersize=9, capsize=4)
    _scale_bytes(axes, sorted({cache.mean for _, _, cache, _ in points}))
    axes.margins(y=0.25)
    axes.set_xlabel("decode cache: bytes for each further token (bf16, measured)")
    axes.set_ylabel(unit)
    if not is_text:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if len(points) > MOST_NAMES:
        legend(figure, [(arm.name, colour, dash) for arm, colour, dash in styled(comparison, ink)])
    else:
        _label_points(
            axes, ink, [(arm.name, colour, cache.mean, quality.mean) for arm, colour, cache, quality in points]
        )
    words = [
        f"{arm.name} {spread(quality, kind)} at {cache.mean:,.5g} bytes a token" for arm, _, cache, quality in points
    ]
    return f"{unit[0].upper()}{unit[1:]}: {', '.join(words)}."


def _scale_bytes(axes: Axes, sizes: list[float]) -> None:
    smallest = min((size for size in sizes if size > 0), default=1.0)
    if sizes[0] > 0:
        axes.set_xscale("log", base=2)
    else:  # a cache that never grows has its place at zero
        axes.set_xscale("symlog", base=2, linthresh=smallest)
    axes.set_xlim(sizes[0] / 2 if sizes[0] > 0 else -smallest / 2, max(sizes[-1], smallest) * 2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.5g}"))


def _label_points(axes: Axes, ink: Ink, points: list[tuple[str, str, float, float]]) -> None:
    """A name beside each point (name, colour, x, y), on the first side where it covers no other name."""
    placed: list[Annotation] = []
    for name, colour, x, y in points:
        for offset, horizontal, vertical in SIDES:
            text = axes.annotate(
                short(name), (x, y), xytext=offset, textcoords="offset points", ha=horizontal, va=vertical,
                color=ink.label(colour), fontweight="bold",
            )  # fmt: skip
            if not any(text.get_window_extent().overlaps(other.get_window_extent()) for other in placed):
                break
            if (offset, horizontal, vertical) != SIDES[-1]:
                text.remove()
        placed.append(text)
