"""A comparison written down: JSON for programs, Markdown, one page for a browser, a table for a terminal."""

from __future__ import annotations

import base64
import html
import json
import math
from typing import Any

from launch.report.compare import Arm, Comparison
from launch.report.plots import Plot
from launch.report.quantities import QUANTITIES, Quantity
from launch.report.record import Record
from launch.report.show import spread

Drawn = list[tuple[Plot, bytes]]

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: #1c1c1c; font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.5rem; margin: 0 0 1rem; overflow-wrap: anywhere; }
.notes { margin: 0 0 1.5rem; padding: .75rem 1rem .75rem 2rem; background: #fff6e0; border-left: 4px solid #e69f00; }
.table { overflow-x: auto; margin-bottom: 1.5rem; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
tbody th { font-weight: normal; color: #555; background: #fff; }
.numbers td, .numbers thead th { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.numbers tbody th { position: sticky; left: 0; }
.numbers tbody tr:hover > * { background: #f3f6f9; }
.plots { display: grid; gap: 1.5rem; margin-bottom: 1.5rem; }
.plots { grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); }
figure { margin: 0; }
figure img { width: 100%; height: auto; display: block; }
figcaption { color: #555; font-size: .85rem; }
summary { cursor: pointer; padding: .4rem 0; font-weight: 600; }
"""


def rows(comparison: Comparison) -> list[tuple[Quantity, list[str]]]:
    """A quantity a row, an arm a column; quantities that no arm has are left out."""
    known = [q for q in QUANTITIES if any(arm.quantities[q.key] is not None for arm in comparison.arms)]
    return [(q, [spread(arm.quantities[q.key], q.kind) for arm in comparison.arms]) for q in known]


def as_json(comparison: Comparison) -> str:
    """Strict JSON, in the units of `quantities` (peak memory in bytes); a number that is not finite is null."""
    content = {
        "arms": [_arm(arm) for arm in comparison.arms],
        "notes": comparison.notes,
        "unigram_entropy": comparison.unigram_entropy,
        "differences": comparison.differences,
        "quantities": {q.key: {"heading": q.heading, "unit": q.unit, "meaning": q.meaning} for q in QUANTITIES},
    }
    return json.dumps(_finite(content), indent=1, allow_nan=False) + "\n"


def as_markdown(comparison: Comparison, drawn: Drawn) -> str:
    """The plots are referred to by the names of their files."""
    names = [arm.name for arm in comparison.arms]
    parts = ["# Comparison", _markdown_notes(comparison), _markdown_table(["", *names], _body(comparison))]
    parts += [f"![{plot.title}]({plot.file})\n\n{plot.title}. {plot.caption}" for plot, _ in drawn]
    if comparison.differences:
        body = [[f"`{key}`", *(_value(row[name]) for name in names)] for key, row in comparison.differences.items()]
        parts += ["## What differs", _markdown_table(["setting", *names], body)]
    parts += ["## Runs", _markdown_table(["arm", "run", "seed", "state", "steps", "ran on"], _runs(comparison))]
    meanings = [[_heading(q), q.meaning] for q, _ in rows(comparison)]
    parts += ["## What the numbers are", _markdown_table(["number", "meaning"], meanings)]
    return "\n\n".join(part for part in parts if part) + "\n"


def as_html(comparison: Comparison, drawn: Drawn) -> str:
    """One file that needs nothing else: style and plots are in it."""
    names = [arm.name for arm in comparison.arms]
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in comparison.notes)
    figures = "".join(
        f'<figure><img alt="{html.escape(plot.title)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        f"<figcaption>{html.escape(plot.caption)}</figcaption></figure>"
        for plot, png in drawn
    )
    differing = [[key, *(_value(row[name]) for name in names)] for key, row in comparison.differences.items()]
    meanings = [[_heading(q), q.meaning] for q, _ in rows(comparison)]
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(', '.join(names))}</title><style>{STYLE}</style></head><body><main>",
            f"<h1>{html.escape(' · '.join(names))}</h1>",
            f'<ul class="notes">{notes}</ul>' if notes else "",
            _html_table(["", *names], _body(comparison), "numbers"),
            f'<section class="plots">{figures}</section>',
            _details("What differs between the arms", _html_table(["setting", *names], differing)) if differing else "",
            _details("The runs", _html_table(["arm", "run", "seed", "state", "steps", "ran on"], _runs(comparison))),
            _details("What the numbers are", _html_table(["number", "meaning"], meanings, "prose")),
            "</main></body></html>",
            "",
        ]
    )


def table_text(comparison: Comparison) -> str:
    """For a terminal, columns aligned."""
    table = [["", *(arm.name for arm in comparison.arms)], *_body(comparison)]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    )


def _body(comparison: Comparison) -> list[list[str]]:
    return [[_heading(quantity), *cells] for quantity, cells in rows(comparison)]


def _heading(quantity: Quantity) -> str:
    return f"{quantity.heading} ({quantity.unit})" if quantity.unit else quantity.heading


def _arm(arm: Arm) -> dict[str, Any]:
    values = {
        key: None if value is None else {"mean": value.mean, "sd": value.sd, "values": value.values}
        for key, value in arm.quantities.items()
    }
    runs = [
        {
            "directory": str(record.directory),
            "seed": record.config.train.seed,
            "state": record.status,
            "finished": record.finished,
            "steps": record.last_step,
            "of_steps": record.config.train.steps,
            "environment": record.environment,
        }
        for record in arm.records
    ]
    return {"name": arm.name, "runs": runs, **values}


def _runs(comparison: Comparison) -> list[list[str]]:
    return [
        [arm.name, str(record.directory), str(record.config.train.seed), record.status,
         f"{record.last_step} of {record.config.train.steps}", _machine(record)]
        for arm in comparison.arms for record in arm.records
    ]  # fmt: skip


def _machine(record: Record) -> str:
    layout, packages = record.environment.get("layout", {}), record.environment.get("packages", {})
    if not layout:
        return "not known"
    device = layout.get("device") or record.environment.get("machine", "")
    return f"{layout.get('ranks')} rank(s) × {layout.get('threads')} thread(s), {device}, torch {packages.get('torch')}"


def _markdown_notes(comparison: Comparison) -> str:
    return "\n".join(f"- {note}" for note in comparison.notes)


def _markdown_table(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _html_table(head: list[str], body: list[list[str]], kind: str = "plain") -> str:
    top = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head)
    lines = "".join(
        f'<tr><th scope="row">{html.escape(first)}</th>' + "".join(f"<td>{html.escape(c)}</td>" for c in rest) + "</tr>"
        for first, *rest in body
    )
    return f'<div class="table"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'


def _details(title: str, content: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary>{content}</details>"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
