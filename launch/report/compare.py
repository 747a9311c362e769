"""Runs side by side: seeds of one arm grouped, what differs between arms, and what makes a comparison unfair."""

from __future__ import annotations

import itertools
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.schema import Refused
from launch.report.quantities import QUANTITIES, unigram_entropy
from launch.report.record import Record, read

SEEDS = ("train.seed", "data.seed")
OWN = (*SEEDS, "run.dir", "run.wandb", "run.project", "run.group", "run.tags")
"""Beginnings of the settings that may differ between two runs of one arm."""

ABSENT = "—"
NO_ENTROPY = "its held-out data cannot be read from here, so its unigram entropy is not known"


@dataclass(frozen=True)
class Spread:
    """mean of the runs' values; sd: their sample standard deviation, None for one run."""

    mean: float
    sd: float | None
    values: list[float]


@dataclass(frozen=True)
class Arm:
    """The runs of one configuration, which differ in the seed alone. quantities: by key; None where not known."""

    name: str
    records: list[Record]
    quantities: dict[str, Spread | None]

    @property
    def seeds(self) -> list[int]:
        return [record.config.train.seed for record in self.records]


@dataclass(frozen=True)
class Comparison:
    """notes: sentences that a reader must know. differences: setting to value by arm, where arms differ."""

    arms: list[Arm]
    notes: list[str]
    differences: dict[str, dict[str, Any]]
    unigram_entropy: float | None


def compare(directories: Sequence[Path]) -> Comparison:
    """Arms in the order of their first runs. Raises Refused where a directory is no run, or is named twice."""
    _refuse_twice(directories)
    groups: dict[tuple[tuple[str, str], ...], list[Record]] = defaultdict(list)
    for record in map(read, directories):
        settings = [(key, repr(value)) for key, value in flat(record.values) if not key.startswith(OWN)]
        groups[tuple(sorted(settings))].append(record)
    arms = [
        Arm(name, records, {q.key: spread_of([q.of(record) for record in records]) for q in QUANTITIES})
        for name, records in zip(names(list(groups.values())), groups.values(), strict=True)
    ]
    entropies = {unigram_entropy(record) for arm in arms for record in arm.records}
    return Comparison(arms, notes(arms), differences(arms), entropies.pop() if len(entropies) == 1 else None)


def names(groups: list[list[Record]]) -> list[str]:
    """For each arm the shortest end of its runs' paths that tells it from the others, without the seed."""
    paths = [[record.directory.resolve().parts for record in group] for group in groups]
    for depth in range(1, max(len(path) for group in paths for path in group) + 1):
        labels = [_common("/".join(path[-depth:]) for path in group) for group in paths]
        if all(labels) and len(set(labels)) == len(labels):
            return labels
    return [str(group[0].directory) for group in groups]


def _common(labels: Iterator[str]) -> str:
    several = list(labels)
    if len(several) == 1:
        return several[0]
    alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*several, strict=False))
    shared = "".join(letters[0] for letters in alike)
    return re.sub(r"[-_./ =]*(seed|s)?[-_./ =]*\d*$", "", shared)


def differences(arms: list[Arm]) -> dict[str, dict[str, Any]]:
    """Every setting that is not the same in all arms, by the first run of each."""
    settings = [dict(flat(arm.records[0].values)) for arm in arms]
    found = {}
    for key in dict.fromkeys(key for values in settings for key in values):
        row = [values.get(key, ABSENT) for values in settings]
        if not key.startswith(OWN) and any(value != row[0] for value in row):
            found[key] = {arm.name: value for arm, value in zip(arms, row, strict=True)}
    return found


def notes(arms: list[Arm]) -> list[str]:
    """What a reader must know before believing a difference between two rows."""
    return [*_unequal(arms), *_unfinished(arms), *_unsure(arms)]


def _unequal(arms: list[Arm]) -> Iterator[str]:
    records = [record for arm in arms for record in arm.records]
    name = {id(record): _label(arm, record) for arm in arms for record in arm.records}
    tokens = {name[id(record)]: record.tokens for record in records}
    if len(set(tokens.values())) > 1:
        told = ", ".join(f"{key} {value:,}" for key, value in tokens.items())
        yield f"Unequal budgets: the last losses do not compare, because the runs have seen different tokens: {told}."
    trains = [record.config.train for record in records]
    if _differ([(train.batch_tokens, train.sequence_length, train.phases, train.ramp) for train in trains]):
        yield "Unequal batches: sequence length, batch, ramp or phases differ between arms."
    if _differ([r.config.data.train for r in records]):
        yield "Different training data: data.train differs between arms."
    elif other := _other_batches(records):
        first, second, step = other
        yield f"Different training data: {name[id(first)]} and {name[id(second)]} saw other batches at step {step}."
    held_out = [(r.config.data.validation, r.config.evaluate.samples, r.config.train.sequence_length) for r in records]
    if _differ(held_out):
        yield "Different held-out data: data.validation, evaluate.samples or the sequence length differ between arms."
    if len({tuple(sorted(arm.seeds)) for arm in arms}) > 1:
        yield "Different seeds: " + ", ".join(f"{arm.name} {_listed(arm.seeds)}" for arm in arms) + "."
    if _differ([(r.environment.get("layout"), r.environment.get("machine"), r.config.engine) for r in records]):
        yield "Different machines, ranks or threads: tokens/s, time and memory do not compare."


def _unfinished(arms: list[Arm]) -> Iterator[str]:
    states: dict[str, list[str]] = defaultdict(list)
    problems: dict[str, list[str]] = defaultdict(list)
    for arm in arms:
        for record in arm.records:
            label = _label(arm, record)
            if not record.finished:
                states[record.status].append(label)
            if record.steps and not record.validations:
                yield f"Not validated: {label} has no held-out loss yet."
            elif record.validations and record.validations[-1]["step"] != record.last_step:
                step = record.validations[-1]["step"]
                yield f"Validated earlier: the held-out numbers of {label} are of step {step}."
            for problem in record.problems:
                problems[problem].append(label)
            if record.config.data.validation is not None and unigram_entropy(record) is None:
                problems[NO_ENTROPY].append(label)
    for state, labels in states.items():
        yield f"Not finished: {', '.join(labels)} {'is' if len(labels) == 1 else 'are'} {state}."
    for problem, labels in problems.items():
        everywhere = len(labels) == sum(len(arm.records) for arm in arms) > 1
        yield f"{'every run' if everywhere else ', '.join(labels)}: {problem}."


def _unsure(arms: list[Arm]) -> Iterator[str]:
    for arm in arms:
        if len(set(arm.seeds)) < len(arm.seeds):
            yield f"{arm.name}: several runs have the same seed, so their spread says nothing about seeds."
    fewest = min(len(set(arm.seeds)) for arm in arms)
    if len(arms) > 1 and fewest < 3:
        yield (
            f"{'One seed' if fewest == 1 else 'Two seeds'} for an arm: a small difference may be chance; "
            "three seeds or more tell."
        )
    for arm in arms:
        declared, measured = arm.quantities["kv_declared"], arm.quantities["kv_measured"]
        if declared is not None and measured is not None and declared.values != measured.values:
            yield f"{arm.name}: the cache measures {measured.mean:g} bytes a token, but {declared.mean:g} are declared."


def _other_batches(records: list[Record]) -> tuple[Record, Record, int] | None:
    """Two runs of one seed, batch and number of ranks whose batches differ, and the first step at which they do."""
    first: dict[tuple[Any, ...], Record] = {}
    for record in records:
        train, layout = record.config.train, record.environment.get("layout", {})
        batches = (train.sequence_length, train.batch_tokens, str(train.phases), str(train.ramp))
        key = (record.config.data.seed, *batches, layout.get("ranks"))
        if (twin := first.setdefault(key, record)) is record:
            continue
        seen = {line["step"]: line.get("batch") for line in twin.steps}
        for line in record.steps:
            if line.get("batch") != seen.get(line["step"], line.get("batch")):
                return twin, record, line["step"]
    return None


def flat(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """A nested configuration as (path, value): `model.layers[0].of[0].attention.latent`."""
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from flat(value, f"{path}.{key}" if path else str(key))
    elif isinstance(values, list) and values:
        for index, value in enumerate(values):
            yield from flat(value, f"{path}[{index}]")
    else:
        yield path, values


def _label(arm: Arm, record: Record) -> str:
    return arm.name if len(arm.records) == 1 else f"{arm.name} ({record.directory.name})"


def _listed(numbers: list[int]) -> str:
    return " and ".join(str(number) for number in sorted(numbers))


def _differ(values: list[Any]) -> bool:
    return any(value != values[0] for value in values)


def spread_of(values: list[float | None]) -> Spread | None:
    """Over the runs that know the value."""
    known = [float(value) for value in values if value is not None]
    if not known:
        return None
    return Spread(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, known)


def _refuse_twice(directories: Sequence[Path]) -> None:
    seen: dict[Path, Path] = {}
    for directory in directories:
        twin = seen.setdefault(directory.resolve(), directory)
        if twin is not directory:
            raise Refused(f"{directory} is named twice; name each run once.")
