"""What a report tells in tables, for whatever writes it down: the numbers, the arms, the held-out sources, the runs."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launch.report.compare import Arm, Comparison
from launch.report.heldout import corpora, tasks
from launch.report.quantities import QUANTITIES, Quantity
from launch.report.record import Record
from launch.report.show import UNKNOWN, compact, shown, spread
from models.config import ModelConfig


@dataclass(frozen=True)
class Table:
    """kind: numbers to be compared along a row, a card for each row, or text. literal: heads of columns to be typed.

    folded: for those who look for it.
    """

    title: str
    head: list[str]
    body: list[list[str]]
    kind: Literal["numbers", "cards", "text"]
    literal: tuple[str, ...] = ()
    folded: bool = False


def tables(comparison: Comparison) -> list[Table]:
    """All that have a row, in the order of a page."""
    made = (numbers, arms, texts, answers, consumed, differences, runs, meanings)
    return [table for table in (make(comparison) for make in made) if table.body]


def numbers(comparison: Comparison) -> Table:
    """A quantity a row, an arm a column; quantities that no arm has are left out."""
    body = [
        [_heading(q), *(spread(arm.quantities[q.key], q.kind) for arm in comparison.arms)] for q in _known(comparison)
    ]
    return Table("Numbers", ["", *_names(comparison)], body, "numbers")


def arms(comparison: Comparison) -> Table:
    """What each arm was."""
    head = ["arm", "layers", "parameters", "tokens", "seeds", "state", "command"]
    return Table("The arms", head, [[arm.name, *_arm(arm)] for arm in comparison.arms], "cards", literal=("command",))


def texts(comparison: Comparison) -> Table:
    """The last validation of each corpus, where there are several."""
    by_arm = [{source.name: source for source in corpora(arm)} for arm in comparison.arms]
    names = dict.fromkeys(name for found in by_arm for name in found)
    body = []
    for name in names if len(names) > 1 else ():
        losses = [spread(found[name].loss if name in found else None, "loss") for found in by_arm]
        bits = [spread(found[name].bpb if name in found else None, "loss") for found in by_arm]
        body.append([f"{name}: loss (nats/token)", *losses])
        if any(cell != UNKNOWN for cell in bits):
            body.append([f"{name}: bits/byte", *bits])
    return Table("Held-out texts", ["", *_names(comparison)], body, "numbers")


def answers(comparison: Comparison) -> Table:
    """The share of answers that are right in the last validation of each task."""
    by_arm = [{source.name: source for source in tasks(arm)} for arm in comparison.arms]
    body = []
    for name in dict.fromkeys(name for found in by_arm for name in found):
        first = next(found[name] for found in by_arm if name in found)
        said = (f"{fact} {value}" for fact, value in first.settings.items())
        settings = ", ".join([*(["the null"] if first.is_null else []), *said])
        guess = UNKNOWN if first.chance is None else shown(first.chance, "percent")
        cells = [spread(found[name].accuracy if name in found else None, "percent") for found in by_arm]
        body.append([f"{name} ({settings})" if settings else name, guess, *cells])
    return Table("Tasks: answers right", ["", "a guess", *_names(comparison)], body, "numbers", folded=True)


def consumed(comparison: Comparison) -> Table:
    """Windows of each training source, where a run has several."""
    by_arm = [[_windows(record) for record in arm.records] for arm in comparison.arms]
    names = dict.fromkeys(name for runs in by_arm for windows in runs for name in windows)
    body = [
        [name, *(" ".join(dict.fromkeys(_count(windows.get(name)) for windows in runs)) for runs in by_arm)]
        for name in names
    ]
    return Table("Windows of each training source", ["", *_names(comparison)], body, "numbers", folded=True)


def differences(comparison: Comparison) -> Table:
    """Settings that are not the same in all arms."""
    names = _names(comparison)
    body = [[key, *(_value(row[name]) for name in names)] for key, row in comparison.differences.items()]
    return Table("What differs between the arms", ["setting", *names], body, "text", literal=("setting",), folded=True)


def runs(comparison: Comparison) -> Table:
    """Every run."""
    body = [
        [arm.name, str(record.directory), str(record.config.train.seed), record.status,
         f"{record.last_step} of {record.config.train.steps}", _machine(record), command(record)]
        for arm in comparison.arms for record in arm.records
    ]  # fmt: skip
    head = ["arm", "run", "seed", "state", "steps", "ran on", "command"]
    return Table("The runs", head, body, "text", literal=("run", "command"), folded=True)


def meanings(comparison: Comparison) -> Table:
    """Of the numbers that are shown."""
    body = [[_heading(q), q.meaning] for q in _known(comparison)]
    return Table("What the numbers are", ["number", "meaning"], body, "text", folded=True)


def command(record: Record) -> str:
    """As it was typed, as far as the run knows: what started its ranks is not known to it."""
    typed = record.environment.get("command")
    if not typed:
        return "not known"
    program = Path(typed[0])
    start = ["python", "-m", program.parent.name] if program.name == "__main__.py" else [str(program)]
    ranks = record.environment.get("layout", {}).get("ranks", 1)
    return shlex.join([*start, *typed[1:]]) + (f"   # each of {ranks} ranks" if ranks > 1 else "")


def layers(model: ModelConfig) -> dict[str, str]:
    """What the layers are made of: `{"attention": "mla × 4", …}`."""
    plans = [(plan, stack.repeat) for stack in model.layers for plan in stack.of]
    counted: dict[str, Counter[str]] = {"attention": Counter(), "feed-forward": Counter()}
    for plan, repeat in plans:
        counted["attention"][str(plan.attention.get("scheme"))] += repeat
        counted["feed-forward"][str(plan.feedforward.get("scheme"))] += repeat
    made = {part: " + ".join(f"{scheme} × {n}" for scheme, n in schemes.items()) for part, schemes in counted.items()}
    return {**made, "residual": str(model.residual.get("scheme"))}


def plain(table: Table) -> str:
    """For a terminal, columns aligned."""
    lines = [table.head, *table.body]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def markdown(table: Table) -> str:
    """With what is to be typed in code."""
    literal = [head in table.literal for head in table.head]
    body = [[f"`{cell}`" if typed else cell for cell, typed in zip(row, literal, strict=True)] for row in table.body]
    lines = [table.head, ["---"] * len(table.head), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _arm(arm: Arm) -> list[str]:
    first = arm.records[0]
    total, active = arm.quantities["parameters_total"], arm.quantities["parameters_active"]
    seen = dict.fromkeys(f"{compact(record.tokens)} in {record.last_step:,} steps" for record in arm.records)
    return [
        ", ".join(f"{part} {made}" for part, made in layers(first.config.model).items()),
        f"{spread(total, 'compact')}, {spread(active, 'compact')} of them active",
        "; ".join(seen),
        ", ".join(str(seed) for seed in arm.seeds),
        "; ".join(dict.fromkeys(record.status for record in arm.records)),
        command(first),
    ]


def _known(comparison: Comparison) -> list[Quantity]:
    return [q for q in QUANTITIES if any(arm.quantities[q.key] is not None for arm in comparison.arms)]


def _names(comparison: Comparison) -> list[str]:
    return [arm.name for arm in comparison.arms]


def _heading(quantity: Quantity) -> str:
    return f"{quantity.heading} ({quantity.unit})" if quantity.unit else quantity.heading


def _machine(record: Record) -> str:
    layout, packages = record.environment.get("layout", {}), record.environment.get("packages", {})
    if not layout:
        return "not known"
    device = layout.get("device") or record.environment.get("machine", "")
    return f"{layout.get('ranks')} rank(s) × {layout.get('threads')} thread(s), {device}, torch {packages.get('torch')}"


def _windows(record: Record) -> Mapping[str, Any]:
    found = record.steps[-1].get("sources") if record.steps else None
    return found if isinstance(found, dict) else {}


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else UNKNOWN


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
