"""Loss over tokens and over time, and how fast it went."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from launch.report.compare import Arm, Comparison
from launch.report.plots.canvas import Ink, Named, level, name_level, name_lines, short, styled, tokens_below
from launch.report.plots.curves import Curve, over_seeds, seconds, smoothed, tokens
from launch.report.record import Record
from launch.report.show import compact, shown, spread


def loss_over_tokens(comparison: Comparison, figure: Figure, ink: Ink) -> str | None:
    """Training loss as lines, held-out loss as dots, multi-token prediction's loss as thin lines."""
    return _loss(comparison, figure, ink, tokens, tokens_below, lambda value: f"{compact(value)} tokens")


def loss_over_time(comparison: Comparison, figure: Figure, ink: Ink) -> str | None:
    """The same against seconds, where all runs had the same machine, ranks and threads."""
    records = [record for arm in comparison.arms for record in arm.records]
    machines = [(record.environment.get("machine"), record.environment.get("layout")) for record in records]
    if any(machine != machines[0] for machine in machines):
        return None
    longest = max((max(seconds(record).values(), default=0.0) for record in records), default=0.0)
    unit, name = next((unit, name) for unit, name in UNITS if longest >= 3 * unit or unit == 1)

    def label(axes: Axes) -> None:
        axes.set_xlabel(f"{name} of training")
        axes.set_xlim(left=0)

    def spent(record: Record) -> dict[int, float]:
        return {step: value / unit for step, value in seconds(record).items()}

    return _loss(comparison, figure, ink, spent, label, lambda value: f"{value:.3g} {name}")


UNITS = ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))


def _loss(
    comparison: Comparison,
    figure: Figure,
    ink: Ink,
    x: Callable[[Record], Mapping[int, float]],
    label: Callable[[Axes], None],
    place: Callable[[float], str],
) -> str | None:
    axes = figure.add_subplot()
    ends, ceilings, words = [], [], []
    for arm, colour, dash in styled(comparison, ink):
        trained = over_seeds(arm.records, x, lambda r: smoothed({line["step"]: line["loss"] for line in r.steps}))
        if trained is None:
            continue
        trained.line(axes, colour, dash)
        last = f"training {spread(arm.quantities['train_loss'], 'loss')} after {place(trained.x[-1])}"
        held_out = over_seeds(arm.records, x, lambda r: {line["step"]: line["val_loss"] for line in r.validations})
        if held_out is not None:
            held_out.dots(axes, colour)
            last += f", held-out {held_out.mean[-1]:.3f}"
        for depth, curve in enumerate(_further(arm, x), 1):
            curve.line(axes, colour, dash, width=0.6)
            ends.append(Named(f"mtp {depth}", colour, dash, float(curve.x[-1]), float(curve.mean[-1]), thin=True))
            last += f", mtp {depth} {curve.mean[-1]:.3f}"
            ceilings.append(float(np.max(curve.high[len(curve.x) // 10 :])))
        words.append(f"{arm.name}: {last}")
        ends.append(Named(arm.name, colour, dash, float(trained.x[-1]), float(trained.mean[-1])))
        # the first steps fall steeply from chance and would flatten everything that is worth seeing
        ceilings.append(float(np.max(trained.high[len(trained.x) // 10 :])))
    if not ends:
        return None
    if (entropy := comparison.unigram_entropy) is not None:
        level(axes, ink, entropy)
        ceilings.append(entropy)
    label(axes)
    axes.set_ylim(top=max(ceilings) * 1.08)
    axes.set_ylabel("loss (nats per token)")
    name_lines(figure, axes, ink, ends)
    if entropy is not None:
        name_level(axes, ink, entropy, "unigram entropy")
    return "; ".join(words) + "."


def _further(arm: Arm, x: Callable[[Record], Mapping[int, float]]) -> list[Curve]:
    """The training loss of multi-token prediction, by how many further tokens it is ahead; none without it."""
    curves = []
    for depth in range(max((record.model.mtp_depth for record in arm.records), default=0)):

        def loss(record: Record, depth: int = depth) -> dict[int, float]:
            known = [line for line in record.steps if len(line.get("mtp_loss", ())) > depth]
            return smoothed({line["step"]: float(line["mtp_loss"][depth]) for line in known})

        curve = over_seeds(arm.records, x, loss)
        if curve is not None:
            curves.append(curve)
    return curves


def speed(comparison: Comparison, figure: Figure, ink: Ink) -> str | None:
    """A bar for each arm's median tokens per second; a thin line spans the middle half of the steps."""
    axes = figure.add_subplot()
    names: list[str] = []
    words = []
    for arm, colour, _ in styled(comparison, ink):
        rates = [line["tokens_per_second"] for record in arm.records for line in record.steps]
        median = arm.quantities["tokens_per_second"]
        if not rates or median is None:
            continue
        low, high = statistics.quantiles(rates, n=4)[::2] if len(rates) > 1 else (rates[0], rates[0])
        axes.barh(len(names), median.mean, color=colour, height=0.6)
        axes.plot([low, high], [len(names)] * 2, color=ink.text, linewidth=1.2, alpha=0.7)
        axes.annotate(shown(median.mean, "count"), (max(high, median.mean), len(names)), xytext=(6, 0),
                      textcoords="offset points", va="center")  # fmt: skip
        names.append(short(arm.name))
        words.append(f"{arm.name} {shown(median.mean, 'count')}")
    if not names:
        return None
    figure.set_figheight(1.1 + 0.42 * len(names))
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.margins(x=0.18)
    axes.set_xlabel("tokens per second, all ranks")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    return f"Tokens per second: {', '.join(words)}."
