"""How often synthetic tasks are answered right: by the length of the window, the needle's depth, how much is asked."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from launch.report.compare import Comparison
from launch.report.heldout import HeldOut, tasks
from launch.report.plots.canvas import Ink, legend, level, name_level, panels, styled
from launch.report.plots.curves import Curve, curve

AVERAGED = ("length", "depth")
"""Facts over which a task is averaged in a picture against another; it has a panel for each value of the rest."""


@dataclass(frozen=True)
class Against:
    """The horizontal axis. facts: what sources call it, one of them in a task. doubling: whether its values double."""

    facts: tuple[str, ...]
    label: str
    doubling: bool

    def of(self, source: HeldOut) -> float | None:
        """None where the source does not say, or leaves it to each window."""
        return next((float(value) for fact in self.facts if (value := source.facts.get(fact)) is not None), None)

    def panel(self, source: HeldOut) -> str:
        """The task with its settings that neither lie on the axis nor are averaged over."""
        rest = [f"{k} {v}" for k, v in source.settings.items() if k not in (*self.facts, *AVERAGED)]
        return ", ".join([str(source.task), *rest])

    def __call__(self, comparison: Comparison, figure: Figure, ink: Ink) -> str | None:
        """A panel a task, a line an arm; hollow dots for its null, a dashed line for a guess.

        None where no task was asked at two values at least.
        """
        asked: dict[str, list[tuple[int, HeldOut]]] = defaultdict(list)
        for index, arm in enumerate(comparison.arms):
            for source in tasks(arm):
                if self.of(source) is not None and source.accuracy is not None:
                    asked[self.panel(source)].append((index, source))
        asked = {name: found for name, found in asked.items() if len({self.of(source) for _, source in found}) > 1}
        if not asked:
            return None
        words = []
        grid = panels(figure, list(asked), self.label, "answers right")
        for axes, (name, found) in zip(grid, asked.items(), strict=True):
            words.append(f"{name}: " + "; ".join(self._panel(axes, found, comparison, ink)))
        owners = {index for found in asked.values() for index, _ in found}
        lines = [(arm.name, colour, dash) for arm, colour, dash in styled(comparison, ink)]
        legend(figure, [line for index, line in enumerate(lines) if index in owners])
        return ". ".join(words) + "."

    def _panel(self, axes: Axes, found: Sequence[tuple[int, HeldOut]], comparison: Comparison, ink: Ink) -> list[str]:
        words = []
        for index, (arm, colour, dash) in enumerate(styled(comparison, ink)):
            mine = [source for owner, source in found if owner == index]
            asked = self._curve([source for source in mine if not source.is_null])
            if asked is not None:
                asked.line(axes, colour, dash, marker="o")
                shares = ", ".join(f"{share:.0%} at {at:g}" for at, share in zip(asked.x, asked.mean, strict=True))
                words.append(f"{arm.name} {shares}")
            null = self._curve([source for source in mine if source.is_null])
            if null is not None:
                null.dots(axes, colour, hollow=True)
                words.append(f"{arm.name} {null.mean.mean():.0%} on the null")
        chances = {source.chance for _, source in found if source.chance is not None}
        for chance in chances:
            level(axes, ink, chance)
        values = sorted({value for _, source in found if (value := self.of(source)) is not None})
        if self.doubling and values[0] > 0:
            axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(values if len(values) <= 6 else values[:: math.ceil(len(values) / 6)])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.set_ylim(-0.03, 1.05)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        if chances:
            name_level(axes, ink, max(chances), "a guess")
        return words

    def _curve(self, sources: Sequence[HeldOut]) -> Curve | None:
        """By value: the mean over what is averaged, seed by seed."""
        by_value: dict[float, list[list[float]]] = defaultdict(list)
        for source in sources:
            if (value := self.of(source)) is not None and source.accuracy is not None:
                by_value[value].append(source.accuracy.values)
        if not by_value:
            return None
        seeds = min(len(values) for several in by_value.values() for values in several)
        at = sorted(by_value)
        shares = [
            [sum(values[seed] for values in by_value[value]) / len(by_value[value]) for value in at]
            for seed in range(seeds)
        ]
        return curve([at] * seeds, shares)
