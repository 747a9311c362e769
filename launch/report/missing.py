"""What a report does not show, and why: numbers that runs lack, plots that nothing was measured for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from launch.report.compare import Comparison
from launch.report.plots.canvas import Plot
from launch.report.quantities import QUANTITIES


def missing(comparison: Comparison, left_out: Sequence[Plot[Comparison]]) -> list[str]:
    """A sentence for the numbers that lack for one reason, and one for all plots that are left out."""
    lacking: dict[tuple[str, tuple[str, ...]], list[str]] = defaultdict(list)
    for quantity in QUANTITIES:
        without = tuple(arm.name for arm in comparison.arms if arm.quantities[quantity.key] is None)
        if without:
            lacking[quantity.absent, without].append(quantity.heading)
    told = [
        f"{', '.join(headings)}: not known of {_listed(without, comparison)}, because {absent}."
        for (absent, without), headings in lacking.items()
    ]
    if left_out:
        plots = "; ".join(f"{plot.title.lower()} needs {plot.needs}" for plot in left_out)
        told.append(f"Not drawn, because no run has the numbers: {plots}.")
    return told


def _listed(names: Sequence[str], comparison: Comparison) -> str:
    return "any arm" if len(names) == len(comparison.arms) else ", ".join(names)
