"""What every picture shares: ink on light and on dark paper, an arm's colour, and how a plot becomes a PNG of each.

An arm has one colour and dash in all pictures; what no run measured is not drawn.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from launch.report.compare import Arm, Comparison
from launch.report.show import compact

WIDTH, HEIGHT, DPI = 5.0, 3.4, 200
"""Inches: small, so that the text can still be read at the width of a phone."""

SMALL = 8.5  # points

T = TypeVar("T")

Dash = Literal["solid", "dashed", "dotted", "dashdot"]
DASHES: tuple[Dash, ...] = ("solid", "dashed", "dotted", "dashdot")

LONGEST_NAME, MOST_NAMES = 14, 7
"""Of arms that are named beside their lines; more and longer names go to a legend below."""

MOST_LETTERS = 28


@dataclass(frozen=True)
class Ink:
    """Colours on one paper. arms: told apart by colour-blind readers too (Okabe and Ito, Color Universal Design)."""

    paper: str
    text: str
    muted: str
    arms: tuple[str, ...]

    def label(self, colour: str) -> str:
        """For text that belongs to something in that colour: nearer to the ink, so that it can be read."""
        red, green, blue = 0.6 * np.array(to_rgb(colour)) + 0.4 * np.array(to_rgb(self.text))
        return to_hex((red, green, blue))

    @property
    def style(self) -> dict[Any, Any]:
        """Of matplotlib."""
        lines = dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "axes.labelcolor"), self.text)
        return lines | {
            "figure.facecolor": self.paper,
            "axes.facecolor": self.paper,
            "text.color": self.text,
            "grid.color": self.muted,
            "grid.alpha": 0.25,
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "text.parse_math": False,  # a name may hold a dollar sign
        }


LIGHT = Ink("#ffffff", "#1c1c1c", "#6b6b6b",
            ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"))  # fmt: skip
DARK = Ink("#15181c", "#e6e6e6", "#a0a0a0",
           ("#3D9BE0", "#F07C2E", "#1FBF8F", "#E09CC4", "#F2BC3D", "#8FD0F5", "#FFFFFF"))  # fmt: skip


@dataclass(frozen=True)
class Plot(Generic[T]):
    """Of a T, such as a comparison. file: of the PNG. needs: what a run must hold for it, which no run does where the
    plot is left out.

    paint: draws into the figure and returns what is seen there in words; None where no run has the numbers.
    """

    file: str
    title: str
    caption: str
    needs: str
    paint: Callable[[T, Figure, Ink], str | None]


@dataclass(frozen=True)
class Picture:
    """A plot as PNG on light and on dark paper. alt: what is seen, in words."""

    plot: Plot[Any]
    alt: str
    light: bytes
    dark: bytes


def draw(plot: Plot[T], subject: T) -> Picture | None:
    """None where no run has what the plot needs."""
    images = []
    alt: str | None = None
    for ink in (LIGHT, DARK):
        with matplotlib.rc_context(ink.style):
            figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
            alt = plot.paint(subject, figure, ink)
            if alt is None:
                return None
            figure.suptitle(plot.title, x=0.01, ha="left", fontsize=11, fontweight="bold")
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png")
            images.append(buffer.getvalue())
    assert alt is not None
    return Picture(plot, f"{plot.title}. {alt}", *images)


def styled(comparison: Comparison, ink: Ink) -> Iterator[tuple[Arm, str, Dash]]:
    """Each arm with its colour and its dash, which begin anew together only after all pairs are used."""
    for index, arm in enumerate(comparison.arms):
        yield arm, ink.arms[index % len(ink.arms)], DASHES[index // len(ink.arms) % len(DASHES)]


def panels(figure: Figure, titles: Sequence[str], x: str, y: str) -> list[Axes]:
    """Small axes with one meaning, two beside each other; the figure grows with their number."""
    columns = min(2, len(titles))
    rows = math.ceil(len(titles) / columns)
    figure.set_size_inches(WIDTH, HEIGHT if len(titles) == 1 else 1.2 + 2.0 * rows)
    figure.set_layout_engine("constrained", wspace=0.06)
    made = []
    for index, title in enumerate(titles):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.set_title(textwrap.fill(title, MOST_LETTERS if columns > 1 else 2 * MOST_LETTERS), loc="left", fontsize=9)
        axes.tick_params(labelsize=SMALL)
        if index + columns >= len(titles):  # nothing is below it
            axes.set_xlabel(x, fontsize=9)
        made.append(axes)
    figure.supylabel(y, fontsize=9)
    return made


def short(name: str) -> str:
    """Of an arm, where there is little room: without its middle."""
    return name if len(name) <= MOST_LETTERS else f"{name[: MOST_LETTERS // 2 - 1]}…{name[-MOST_LETTERS // 2 :]}"


@dataclass(frozen=True)
class Named:
    """A line in a picture: whose it is, how it is drawn, and where it ends, in the axes' data. thin: it is drawn so,
    beside another of the same colour and dash, and a legend does not name it."""

    name: str
    colour: str
    dash: Dash
    x: float
    y: float
    thin: bool = False


def name_lines(figure: Figure, axes: Axes, ink: Ink, lines: Sequence[Named]) -> None:
    """Each line's name at its end, where all end at the right and the names are short; else a legend below.

    Call it when the axes' limits stand.
    """
    left, right = axes.get_xlim()
    near_the_right = all(line.x >= right - 0.06 * (right - left) for line in lines)
    short = len(lines) <= MOST_NAMES and all(len(line.name) <= LONGEST_NAME for line in lines)
    if not (near_the_right and short):
        legend(figure, [(line.name, line.colour, line.dash) for line in lines if not line.thin])
        return
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = [float(np.clip(to_axes.transform((line.x, line.y))[1], 0.0, 1.0)) for line in lines]
    for line, height in zip(lines, spaced(wanted, gap=0.065), strict=True):
        axes.annotate(
            line.name, (1.0, height), xycoords="axes fraction", xytext=(4, 0), textcoords="offset points",
            va="center", color=ink.label(line.colour), fontweight="normal" if line.thin else "bold", fontsize=9,
            annotation_clip=False,
        )  # fmt: skip


def legend(figure: Figure, lines: Sequence[tuple[str, str, Dash]]) -> None:
    """(name, colour, dash) below everything."""
    handles = [Line2D([], [], color=colour, linestyle=dash, label=short(name)) for name, colour, dash in lines]
    columns = max(1, min(len(lines), 60 // (max(len(short(name)) for name, _, _ in lines) + 8)))
    figure.set_figheight(figure.get_figheight() + 0.2 * (math.ceil(len(lines) / columns) - 1))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def spaced(heights: Sequence[float], gap: float) -> list[float]:
    """`heights` moved apart until neighbours are `gap` apart, in their order, the whole as near to them as it goes."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    # pool neighbours that are too close around the mean of what they want
    groups: list[tuple[list[int], float]] = []
    for index in order:
        members, centre = [index], heights[index]
        while groups and centre - groups[-1][1] < gap * (len(members) + len(groups[-1][0])) / 2:
            before, other = groups.pop()
            centre = (centre * len(members) + other * len(before)) / (len(members) + len(before))
            members = before + members
        groups.append((members, centre))
    moved = [0.0] * len(heights)
    for members, centre in groups:
        for place, index in enumerate(members):
            moved[index] = centre + gap * (place - (len(members) - 1) / 2)
    return moved


def level(axes: Axes, ink: Ink, height: float) -> None:
    """A dashed line across the axes at a height that means something; `name_level` says what."""
    axes.axhline(height, color=ink.muted, linewidth=1, linestyle=(0, (4, 3)))


def name_level(axes: Axes, ink: Ink, height: float, words: str) -> None:
    """Above or below the line, where the words lie on the least of what is drawn.

    Call it when the axes' limits stand and all is drawn.
    """
    drawn, margin = np.concatenate([_drawn(line) for line in axes.lines]), 2.5 * axes.figure.dpi / 72
    texts = [
        axes.annotate(
            words, (x, height), xycoords=("axes fraction", "data"), xytext=(0, up), textcoords="offset points",
            ha=horizontal, va=vertical, color=ink.muted, fontsize=SMALL,
        )
        for x, horizontal in ((0.99, "right"), (0.5, "center"), (0.01, "left"))
        for up, vertical in ((3, "bottom"), (-3, "top"))
    ]  # fmt: skip

    def covered(text: Annotation) -> tuple[bool, int]:
        box = text.get_window_extent()
        return not axes.bbox.y0 <= box.y0 < box.y1 <= axes.bbox.y1, box.padded(margin).count_contains(drawn)

    best = min(texts, key=covered)
    for text in texts:
        if text is not best:
            text.remove()


def _drawn(line: Line2D) -> NDArray[np.float64]:
    """Pixels [points, 2] along a line, or of its dots alone where nothing joins them."""
    path = line.get_path().transformed(line.get_transform())
    return np.asarray((path if line.get_linestyle() == "None" else path.interpolated(20)).vertices)


def tokens_below(axes: Axes) -> None:
    """The axis of training tokens."""
    axes.set_xlabel("training tokens")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    axes.set_xlim(left=0)
