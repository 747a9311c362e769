"""What an arm's runs say of each held-out source at their last validation: corpora by loss, tasks by accuracy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launch.report import validation
from launch.report.compare import Arm, Spread, spread_of
from launch.report.record import Record


@dataclass(frozen=True)
class HeldOut:
    """One source as the runs of one arm see it."""

    name: str
    loss: Spread | None
    bpb: Spread | None
    accuracy: Spread | None
    facts: Mapping[str, Any]

    @property
    def task(self) -> str | None:
        """Of a synthetic source; None for a corpus."""
        return self.facts.get("task")

    @property
    def settings(self) -> dict[str, Any]:
        """Of the task: its facts without those that are none, or left to each window."""
        return {k: v for k, v in self.facts.items() if k not in ("task", "chance", "null") and v is not None}

    @property
    def chance(self) -> float | None:
        """The accuracy of a guess, where the source says it."""
        return self.facts.get("chance")

    @property
    def is_null(self) -> bool:
        """Whether this is the task's null, whose answers cannot be known."""
        return bool(self.facts.get("null"))


def last(record: Record) -> dict[str, validation.Source]:
    """Of the last validation that names its sources; empty where none does."""
    found = (validation.sources(line) for line in reversed(record.validations))
    return next((sources for sources in found if sources), {})


def held_out(arm: Arm) -> dict[str, HeldOut]:
    """By name, in the order of the configuration."""
    runs = [last(record) for record in arm.records]
    names = dict.fromkeys(name for sources in runs for name in sources)
    return {name: _of_runs(name, [sources[name] for sources in runs if name in sources]) for name in names}


def corpora(arm: Arm) -> list[HeldOut]:
    """The sources that are text."""
    return [source for source in held_out(arm).values() if source.task is None]


def tasks(arm: Arm) -> list[HeldOut]:
    """The sources that are synthetic."""
    return [source for source in held_out(arm).values() if source.task is not None]


def _of_runs(name: str, seen: list[validation.Source]) -> HeldOut:
    return HeldOut(
        name=name,
        loss=spread_of([source.loss for source in seen if math.isfinite(source.loss)]),
        bpb=spread_of([source.bpb for source in seen]),
        accuracy=spread_of([source.accuracy for source in seen]),
        facts=seen[0].facts,
    )
