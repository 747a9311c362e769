"""A study in pictures: quality against cache, recall by pairs, curves over ratios, 2×2s."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from launch.report.compare import Spread, spread_of
from launch.report.plots import canvas
from launch.report.plots.canvas import DASHES, SMALL, Ink, Picture, Plot, legend, panels
from launch.report.show import shown, spread
from launch.study.contrasts import Value, paired, pairs_asked, recall, text_loss
from launch.study.results import Results
from launch.study.tables import Measure, measures, ratio


def draw(results: Results) -> list[Picture]:
    """All that there are numbers for."""
    return [picture for plot in PLOTS if (picture := canvas.draw(plot, results)) is not None]


def quality(results: Results, figure: Figure, ink: Ink) -> str | None:
    """A row an arm, by what it caches: its loss less the baseline's, paired by seed."""
    rows = [
        (f"{name}  {arm.cache.measured / arm.cache.context:,.4g} B", found)
        for name, arm in sorted(results.arms.items(), key=lambda item: -item[1].cache.measured)
        if (found := paired(results, name, results.study.baseline, text_loss)) is not None
    ]
    if not rows:
        return None
    figure.set_size_inches(5.0, 1.2 + 0.22 * len(rows))
    axes = figure.add_subplot()
    axes.axvline(0.0, color=ink.muted, linewidth=1)
    for row, (_, found) in enumerate(rows):
        bar = 2 * (found.error or 0.0)
        axes.errorbar(found.mean, row, xerr=bar, color=ink.arms[0], marker="o", markersize=4, capsize=2)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=SMALL)
    axes.invert_yaxis()
    axes.set_xlabel(f"bits per byte above {results.study.baseline}")
    words = [f"{label} {shown(found.mean, 'loss')}" for label, found in rows]
    return f"Held-out bits per byte above {results.study.baseline}: {', '.join(words)}."


def recalled(results: Results, figure: Figure, ink: Ink) -> str | None:
    """A row an arm, a column a number of pairs, the share of right answers as colour and in figures."""
    pairs = pairs_asked(results.runs)
    names = sorted(results.arms, key=lambda name: -results.arms[name].cache.measured)
    rows = [(name, [_of(results, name, recall(n)) for n in pairs]) for name in names]
    rows = [(name, found) for name, found in rows if any(found)]
    if not rows:
        return None
    figure.set_size_inches(5.0, 1.2 + 0.24 * len(rows))
    axes = figure.add_subplot()
    shares = [[math.nan if cell is None else cell.mean for cell in found] for _, found in rows]
    axes.imshow(shares, aspect="auto", vmin=0.0, vmax=1.0, cmap="cividis")
    for row, (_, found) in enumerate(rows):
        for column, cell in enumerate(found):
            if cell is not None:
                # the map is dark where the share is low, on either paper
                colour = "#ffffff" if cell.mean < 0.6 else "#000000"
                text = f"{cell.mean:.0%}" + ("" if cell.sd is None else f" ± {100 * cell.sd:.0f}")
                axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=SMALL)
    axes.set_xticks(range(len(pairs)), [str(n) for n in pairs])
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=SMALL)
    axes.set_xlabel("pairs in the window")
    axes.grid(False)
    words = [
        f"{name} " + ", ".join(f"{cell.mean:.0%} at {n}" for n, cell in zip(pairs, found, strict=True) if cell)
        for name, found in rows
    ]
    return "; ".join(words) + "."


def over_ratios(results: Results, figure: Figure, ink: Ink) -> str | None:
    """A panel a measure, a line a scheme, from the baseline on."""
    kinds = _measured(results)
    lines = {
        title: [results.study.baseline, *names]
        for title, names in results.study.curves.items()
        if any(results.by_seed(name) for name in names)
    }
    if not kinds or not lines:
        return None
    words = []
    for axes, measure in zip(_panels(figure, kinds, "cache of the baseline ÷ the arm's"), kinds, strict=True):
        for index, (title, names) in enumerate(lines.items()):
            known = [(ratio(results, n), found) for n in names if (found := _of(results, n, measure[2])) is not None]
            _line(axes, ink, index, [(x, found) for x, found in known], measure)
            said = ", ".join(f"{spread(found, measure[1])} at {x:.3g}×" for x, found in known)
            words.append(f"{measure[0]}, {title}: {said}")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    legend(figure, [(title, _colour(ink, i), DASHES[0]) for i, title in enumerate(lines)])
    return "; ".join(words) + "."


def two_by_two(results: Results, figure: Figure, ink: Ink) -> str | None:
    """A panel a measure: without and with the second change, a line for without and with the first. Parallel lines are
    no interaction."""
    if not results.study.interactions:
        return None
    square = results.study.interactions[0]
    pairs = ((square.neither, square.second), (square.first, square.both))
    arms = [name for pair in pairs for name in pair]
    kinds = [m for m in measures(results) if all(_of(results, name, m[2]) is not None for name in arms)]
    if not kinds:
        return None
    words = []
    for axes, measure in zip(_panels(figure, kinds, ""), kinds, strict=True):
        for index, pair in enumerate(pairs):
            known = [
                (float(x), found) for x, n in enumerate(pair) if (found := _of(results, n, measure[2])) is not None
            ]
            _line(axes, ink, index, known, measure)
            words += [f"{measure[0]}, {n}: {spread(_of(results, n, measure[2]), measure[1])}" for n in pair]
        axes.set_xticks([0, 1], [f"without what {square.second} has", "with it"], fontsize=SMALL)
        axes.set_xlim(-0.3, 1.3)
    legend(figure, [(" → ".join(pair), _colour(ink, index), DASHES[0]) for index, pair in enumerate(pairs)])
    return "; ".join(words) + "."


def _line(axes: Axes, ink: Ink, index: int, known: Sequence[tuple[float, Spread]], measure: Measure) -> None:
    """Points with their seeds' standard deviation, of a share between 0 and 1."""
    is_share = measure[1] == "percent"
    lowest, highest = (0.0, 1.0) if is_share else (-math.inf, math.inf)
    x, means = [x for x, _ in known], [found.mean for _, found in known]
    below = [min(found.sd or 0.0, found.mean - lowest) for _, found in known]
    above = [min(found.sd or 0.0, highest - found.mean) for _, found in known]
    axes.errorbar(x, means, yerr=[below, above], color=_colour(ink, index), marker="o", markersize=5, capsize=3)
    if is_share:
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value, measure[1])))


def _panels(figure: Figure, kinds: Sequence[Measure], x: str) -> list[Axes]:
    return panels(figure, [heading for heading, _, _ in kinds], x, "")


def _measured(results: Results) -> list[Measure]:
    """Those that some run has."""
    return [measure for measure in measures(results) if any(measure[2](run) is not None for run in results.runs)]


def _of(results: Results, name: str, value: Value) -> Spread | None:
    return spread_of([value(run) for run in results.by_seed(name).values()])


def _colour(ink: Ink, index: int) -> str:
    return ink.arms[index % len(ink.arms)]


# fmt: off
PLOTS: tuple[Plot[Results], ...] = (
    Plot("quality.png", "Held-out loss against cache", "Differences are paired by seed, bars two standard errors; the "
         "arm with the largest cache first, beside it its bytes a token.", "a validation on text", quality),
    Plot("recall.png", "Associative recall by number of pairs", "Answers right, mean over the seeds, ± one standard "
         "deviation in points; the arm with the largest cache first.", "a validation on recall", recalled),
    Plot("ratios.png", "Quality over the ratio of compression", "Each line begins at the baseline, 1×. Bars: one "
         "standard deviation over the seeds, cut at 0 and 100 %.", "the arms of a curve", over_ratios),
    Plot("interaction.png", "2×2", "Parallel lines are no interaction. Bars: one standard deviation over the seeds, "
         "cut at 0 and 100 %.", "the four arms of a 2×2", two_by_two),
)
# fmt: on
