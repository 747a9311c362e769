"""How evenly the routers load their experts: over all layers, and layer by layer, over training."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from launch.report.compare import Arm, Comparison
from launch.report.plots.canvas import WIDTH, Ink, Named, level, name_level, name_lines, short, styled, tokens_below
from launch.report.plots.curves import over_seeds, smoothed, tokens
from launch.report.quantities import load_balance
from launch.report.record import Record
from models.model import Model
from models.moe.experts import Experts

MOST_COLUMNS = 100


def mean_over_layers(comparison: Comparison, figure: Figure, ink: Ink) -> str | None:
    """A line an arm."""
    axes = figure.add_subplot()
    ends = []
    for arm, colour, dash in styled(comparison, ink):
        curve = over_seeds(arm.records, tokens, _balance)
        if curve is None:
            continue
        curve.line(axes, colour, dash)
        ends.append(Named(arm.name, colour, dash, float(curve.x[-1]), float(curve.mean[-1])))
    if not ends:
        return None
    level(axes, ink, 1.0)
    tokens_below(axes)
    axes.set_ylim(bottom=0.9)
    axes.set_ylabel("busiest expert ÷ mean load")
    name_lines(figure, axes, ink, ends)
    name_level(axes, ink, 1.0, "even")
    return "At the end: " + ", ".join(f"{end.name} {end.y:.2f}" for end in ends) + "; 1 is even."


def by_layer(comparison: Comparison, figure: Figure, ink: Ink) -> str | None:
    """A strip an arm: a row for each layer with experts, those of multi-token prediction last, tokens from left to
    right, the load as colour."""
    maps = [(arm, found) for arm in comparison.arms if (found := layer_map(arm)) is not None]
    if not maps:
        return None
    rows = [max(0.4, 0.16 * len(loads)) for _, (_, loads) in maps]
    figure.set_size_inches(WIDTH, 1.1 + sum(rows) + 0.3 * len(rows))
    panels = figure.subplots(len(maps), 1, sharex=True, squeeze=False, height_ratios=rows)[:, 0]
    # a first step far from even would leave the rest in one colour
    top = max(1.01, max(float(np.percentile(loads, 98)) for _, (_, loads) in maps))
    image: AxesImage | None = None
    for axes, (arm, (end, loads)) in zip(panels, maps, strict=True):
        image = axes.imshow(loads, aspect="auto", interpolation="nearest", cmap="cividis", vmin=1.0, vmax=top,
                            extent=(0, end, len(loads) - 0.5, -0.5))  # fmt: skip
        axes.grid(False)
        axes.set_title(short(arm.name), loc="left", fontsize=9)
        named = names_of_rows(arm.records[0].model)
        rows_of_depth = [row for row, name in enumerate(named) if name.isdecimal()]
        some = MaxNLocator(4, integer=True).tick_values(0, max(1, len(rows_of_depth) - 1))
        ticks = [row for row in range(len(named)) if row in some or row not in rows_of_depth]
        axes.set_yticks(ticks, [named[row] for row in ticks])
    tokens_below(panels[-1])
    panels[-1].set_xlim(0, max(end for _, (end, _) in maps))
    figure.supylabel("layer with experts, from the input", fontsize=9)
    assert image is not None
    figure.colorbar(image, ax=list(panels), label="busiest expert ÷ mean", extend="max", aspect=12)
    worst = []
    for arm, (_, loads) in maps:
        name = names_of_rows(arm.records[0].model)[int(np.argmax(loads[:, -1]))]
        called = f"layer {name}" if name.isdecimal() else name
        worst.append(f"{arm.name} {called} ({loads[:, -1].max():.2f})")
    return f"Least even at the end: {', '.join(worst)}."


def names_of_rows(model: Model) -> list[str]:
    """Of the layers with experts, in the order of a step's loads: their depths, or `mtp 1` and so on."""
    named = zip(model.trained_names(), model.trained_blocks(), strict=True)
    return [name for name, block in named if any(isinstance(module, Experts) for module in block.modules())]


def layer_map(arm: Arm) -> tuple[float, NDArray[np.float64]] | None:
    """The tokens at its right edge, and loads [layers, columns]: means over the seeds and over a column's steps.

    As far as the seed went that was stopped first; None for a model without experts.
    """
    found = [by_step for record in arm.records if (by_step := _loads(record))]
    steps = sorted(set.intersection(*map(set, found))) if found else []
    if not steps:
        return None
    loads = np.array([[by_step[step] for step in steps] for by_step in found], np.float64).mean(0)
    parts = np.array_split(loads, min(MOST_COLUMNS, len(steps)))
    end = next(places[steps[-1]] for record in arm.records if steps[-1] in (places := tokens(record)))
    return end, np.stack([part.mean(0) for part in parts], axis=1)


def _loads(record: Record) -> dict[int, list[float]]:
    return {line["step"]: line["load"] for line in record.steps if line.get("load")}


def _balance(record: Record) -> dict[int, float]:
    return smoothed({line["step"]: load for line in record.steps if (load := load_balance(line)) is not None})
