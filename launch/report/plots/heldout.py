"""Held-out loss in parts: by source over training, and by position in the window."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from launch.report import heldout, validation
from launch.report.compare import Comparison
from launch.report.plots.canvas import Ink, Named, legend, name_lines, panels, styled
from launch.report.plots.curves import over_seeds, tokens
from launch.report.record import Record
from launch.report.show import compact


def by_source(comparison: Comparison, figure: Figure, ink: Ink) -> str | None:
    """A panel for each corpus, each with its own scale, for the losses of different texts do not compare."""
    names = list(dict.fromkeys(source.name for arm in comparison.arms for source in heldout.corpora(arm)))
    if len(names) < 2:
        return None
    words = []
    drawn: set[str] = set()
    grid = panels(figure, names, "training tokens", "held-out loss (nats per token)")
    for axes, name in zip(grid, names, strict=True):
        ends = _losses_of(name, axes, comparison, ink)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
        words.append(f"{name}: " + ", ".join(f"{arm} {loss:.3f}" for arm, loss in ends))
        drawn |= {arm for arm, _ in ends}
    legend(figure, [(arm.name, colour, dash) for arm, colour, dash in styled(comparison, ink) if arm.name in drawn])
    return "At the end: " + "; ".join(words) + "."


def _losses_of(name: str, axes: Axes, comparison: Comparison, ink: Ink) -> list[tuple[str, float]]:
    ends = []
    for arm, colour, dash in styled(comparison, ink):
        curve = over_seeds(arm.records, tokens, _losses(name))
        if curve is not None:
            curve.line(axes, colour, dash, marker="o")
            ends.append((arm.name, float(curve.mean[-1])))
    return ends


def _losses(name: str) -> Callable[[Record], dict[int, float]]:
    """The loss of that source by step."""
    return lambda record: {
        line["step"]: found[name].loss for line in record.validations if name in (found := validation.sources(line))
    }


def by_position(comparison: Comparison, figure: Figure, ink: Ink) -> str | None:
    """A line an arm, over bins of positions; the longest context is at the right."""
    axes = figure.add_subplot()
    ends, words = [], []
    first_edges: list[float] = []
    for arm, colour, dash in styled(comparison, ink):
        found = [positions for record in arm.records if (positions := _last_positions(record)) is not None]
        alike = [positions.loss for positions in found if positions.edges == found[0].edges]
        if not alike:
            continue
        edges, losses = np.array(found[0].edges), np.array(alike)
        axes.stairs(losses.mean(0), edges, color=colour, linestyle=dash, linewidth=1.4, baseline=None)
        if len(alike) > 1:
            low, high = (np.append(side, side[-1]) for side in (losses.min(0), losses.max(0)))
            axes.fill_between(edges, low, high, step="post", color=colour, alpha=0.18, linewidth=0)
        known = losses.mean(0)[np.isfinite(losses.mean(0))]
        if len(known):
            ends.append(Named(arm.name, colour, dash, float(edges[-1]), float(known[-1])))
            words.append(f"{arm.name} {known[0]:.3f} in the first bin, {known[-1]:.3f} in the last")
            first_edges.append(float(edges[1]))
    if not ends:
        return None
    right = max(end.x for end in ends)
    if right > 16 * min(first_edges):  # bins that widen: the first ones would not be seen
        axes.set_xscale("symlog", base=2, linthresh=min(first_edges))
    axes.set_xlim(0, right)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_xlabel("position in the window (tokens)")
    axes.set_ylabel("held-out loss (nats per token)")
    name_lines(figure, axes, ink, ends)
    return "; ".join(words) + "."


def _last_positions(record: Record) -> validation.Positions | None:
    found = (validation.positions(line) for line in reversed(record.validations))
    return next((positions for positions in found if positions is not None), None)
