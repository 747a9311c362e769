"""What a study has measured, in one JSON file that needs no run directory: `study.json`."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from conf.schema import Refused, build
from launch.report import heldout
from launch.report.quantities import QUANTITIES
from launch.report.record import Record
from launch.report.show import finite
from launch.report.tables import layers
from launch.study.config import Study
from launch.study.matching import Matched
from models import cost
from models.cache import Cache
from models.model import Model
from train import config as run_config
from train.rundir import write_whole

NAME = "study.json"
POINTS = 50
"""Of a run's loss curve."""


@dataclass(frozen=True)
class CacheSize:
    """Bytes in bf16 of one sequence of `context` tokens, all told, and by which it grows with a token. declared: by the
    schemes; measured: of the tensors that are allocated."""

    context: int
    declared: float
    measured: float
    growth: float


@dataclass(frozen=True)
class Arm:
    """arguments: of its runs, without seed and directory. width: solved for. off: parameters more than the anchor's.
    configuration: digest of what the arguments resolve to; None where results are older than that."""

    arguments: list[str]
    width: int
    total: int
    active: int
    looked_up: int
    unit: int
    off: int
    cache: CacheSize
    layers: dict[str, str]
    configuration: str | None = None


@dataclass(frozen=True)
class Trial:
    """A run that was made to choose a setting. loss: of its last validation, in nats; None where it failed."""

    arm: str
    value: float
    loss: float | None


@dataclass(frozen=True)
class Run:
    """One run that came to its end. sources: of the last validation, by name: loss, accuracy, bpb, facts.
    curve: steps and their training losses, each the mean since the one before.
    tuned: the value that trials chose for its arm; None where a study has no such setting."""

    arm: str
    seed: int
    steps: int
    tokens: int
    seconds: float | None
    tokens_per_second: float | None
    sources: dict[str, dict[str, Any]]
    curve: list[list[float]]
    machine: str
    torch: str
    tuned: float | None = None


@dataclass
class Results:
    """failed: by the run's name, what it said last."""

    study: Study
    common: list[str]
    arms: dict[str, Arm]
    runs: list[Run] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        measured: list[Run | Trial] = [*self.runs, *self.trials]
        if unknown := {each.arm for each in measured} - self.arms.keys():
            raise ValueError(f"there are results of {min(unknown)}, which is none of its arms")

    def has(self, arm: str, seed: int) -> bool:
        return any(run.arm == arm and run.seed == seed for run in self.runs)

    def by_seed(self, arm: str) -> dict[int, Run]:
        """The arm's runs."""
        return {run.seed: run for run in self.runs if run.arm == arm}

    def tried(self, arm: str, value: float) -> bool:
        return any(trial.arm == arm and trial.value == value for trial in self.trials)

    def tuned(self, arm: str) -> float | None:
        """The value that the arm's trials choose; None while some are to be made, or where all failed."""
        tuning = self.study.tuning
        if tuning is None or not all(self.tried(arm, value) for value in tuning.values):
            return None
        losses = {trial.value: trial.loss for trial in self.trials if trial.arm == arm}
        ended = [(loss, value) for value in tuning.values if (loss := losses[value]) is not None]
        return min(ended)[1] if ended else None

    def write(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(directory / NAME, json.dumps(finite(asdict(self)), indent=1, allow_nan=False) + "\n")


def load(file: Path) -> Results:
    """Raises Refused."""
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or "it is no JSON"
        raise Refused(f"{file} cannot be read ({reason}); name the {NAME} that a study wrote.") from None
    return build(Results, values, str(file))


def go_on(directory: Path, results: Results) -> None:
    """Take over what an earlier start has measured. Raises Refused where an arm is not what it was."""
    if not (directory / NAME).exists():
        return
    earlier = load(directory / NAME)
    if (earlier.runs or earlier.trials) and earlier.study.tuning != results.study.tuning:
        raise Refused(f"{directory / NAME} has results of arms tuned otherwise; choose another out=, or take it back.")
    known: list[Run | Trial] = [*earlier.runs, *earlier.trials]
    for measured in known:
        name = measured.arm
        if name not in results.arms:
            continue
        old, new = earlier.arms[name], results.arms[name]
        if not _alike(old, new):
            changed = min(set(old.arguments) ^ set(new.arguments), default="in a file of conf")
            raise Refused(
                f"{directory / NAME} has results of {name} with other settings ({changed}); choose another out=, or "
                "take them back."
            )
        if isinstance(measured, Run):
            results.runs.append(measured)
        else:
            results.trials.append(measured)


def _alike(old: Arm, new: Arm) -> bool:
    """Whether runs of both are told the same, in whatever order and words."""
    if old.configuration is None:
        return old.arguments == new.arguments
    return old.configuration == new.configuration


def arm_of(matched: Matched, arguments: list[str], context: int, values: Mapping[str, Any]) -> Arm:
    """values: the resolved configuration of the arm."""
    config = run_config.read(values)
    with torch.device("meta"):
        model = Model(config.model, torch.bfloat16)
    assert cost.parameters(model) == matched.parameters
    measured = sum(Cache(model, 1, context, "meta").num_bytes().values())
    cache = CacheSize(context, cost.kv_bytes(model, context)["total"], measured, cost.kv_bytes_per_token(model))
    sizes = matched.parameters
    told = json.dumps(asdict(config), sort_keys=True).encode()
    return Arm(
        arguments, matched.width, sizes.total, sizes.active, sizes.looked_up, matched.unit, matched.off, cache,
        layers(config.model), hashlib.blake2b(told, digest_size=8).hexdigest(),
    )  # fmt: skip


def trial_of(arm: str, value: float, record: Record | None) -> Trial:
    """record: of its run directory; None where it failed."""
    losses = [] if record is None else [line["val_loss"] for line in record.validations if "val_loss" in line]
    return Trial(arm, value, losses[-1] if losses and math.isfinite(losses[-1]) else None)


def run_of(arm: str, seed: int, record: Record, tuned: float | None) -> Run:
    """Of a run directory."""
    quantity = {q.key: q.of for q in QUANTITIES}
    environment = record.environment
    return Run(
        arm=arm,
        seed=seed,
        steps=record.last_step,
        tokens=record.tokens,
        seconds=quantity["seconds"](record),
        tokens_per_second=quantity["tokens_per_second"](record),
        sources={name: asdict(source) for name, source in heldout.last(record).items()},
        curve=_curve(record),
        machine=str(environment.get("layout", {}).get("device") or environment.get("machine", "")),
        torch=str(environment.get("packages", {}).get("torch", "")),
        tuned=tuned,
    )


def _curve(record: Record) -> list[list[float]]:
    losses = [line["loss"] for line in record.steps]
    edges = [round(i * len(losses) / POINTS) for i in range(POINTS + 1)]
    parts = [(stop, losses[start:stop]) for start, stop in pairwise(edges) if stop > start]
    return [[stop, sum(part) / len(part)] for stop, part in parts]
