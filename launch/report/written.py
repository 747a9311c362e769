"""A report as JSON, for programs, and as Markdown."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from launch.report.compare import Arm
from launch.report.content import Content
from launch.report.heldout import held_out
from launch.report.quantities import QUANTITIES
from launch.report.show import finite
from launch.report.tables import command, layers, markdown


def as_json(content: Content) -> str:
    """Strict JSON, in the units of `quantities` (peak memory in bytes); a number that is not finite is null."""
    comparison = content.comparison
    values = {
        "arms": [_arm(arm) for arm in comparison.arms],
        "notes": comparison.notes,
        "missing": content.missing,
        "unigram_entropy": comparison.unigram_entropy,
        "differences": comparison.differences,
        "quantities": {q.key: {"heading": q.heading, "unit": q.unit, "meaning": q.meaning} for q in QUANTITIES},
    }
    return json.dumps(finite(values), indent=1, allow_nan=False) + "\n"


def as_markdown(content: Content) -> str:
    """The plots are referred to by the names of their files."""
    numbers, *others = content.tables
    parts = ["# Comparison", _list(content.comparison.notes), markdown(numbers)]
    for picture in content.pictures:
        parts.append(f"![{picture.alt}]({picture.plot.file})\n\n{picture.plot.title}. {picture.plot.caption}")
    parts += [f"## {table.title}\n\n{markdown(table)}" for table in others]
    if content.missing:
        parts.append(f"## What is missing, and why\n\n{_list(content.missing)}")
    return "\n\n".join(part for part in parts if part) + "\n"


def _arm(arm: Arm) -> dict[str, Any]:
    values = {key: None if value is None else asdict(value) for key, value in arm.quantities.items()}
    runs = [
        {
            "directory": str(record.directory),
            "seed": record.config.train.seed,
            "state": record.status,
            "finished": record.finished,
            "steps": record.last_step,
            "of_steps": record.config.train.steps,
            "command": command(record),
            "environment": record.environment,
        }
        for record in arm.records
    ]
    sources = {name: asdict(source) for name, source in held_out(arm).items()}
    return {"name": arm.name, "layers": layers(arm.records[0].config.model), "runs": runs, **values, "sources": sources}


def _list(sentences: list[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)
