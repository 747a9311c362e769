"""Everything that a report says, made once, for JSON, Markdown and the page to write down."""

from __future__ import annotations

from dataclasses import dataclass

from launch.report.compare import Comparison
from launch.report.missing import missing
from launch.report.plots.canvas import Picture, draw
from launch.report.plots.menu import PLOTS
from launch.report.tables import Table, tables


@dataclass(frozen=True)
class Content:
    """missing: sentences on what the report does not show, and why."""

    comparison: Comparison
    tables: list[Table]
    pictures: list[Picture]
    missing: list[str]


def content(comparison: Comparison) -> Content:
    """Draws all that there are numbers for."""
    drawn = [(plot, draw(plot, comparison)) for plot in PLOTS]
    pictures = [picture for _, picture in drawn if picture is not None]
    left_out = [plot for plot, picture in drawn if picture is None]
    return Content(comparison, tables(comparison), pictures, missing(comparison, left_out))
