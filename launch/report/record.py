"""What a run directory holds, read as it stands: finished, still going, interrupted or damaged."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml

from conf.schema import Refused
from launch.lock import is_locked
from launch.report import validation
from models.model import Model
from train import config as run_config
from train.config import Config

Line = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """One run. values: its resolved configuration as written. environment: what it ran on, empty if that is not known.

    steps, validations, saves: the lines of metrics.jsonl, one a step, by increasing step. running: a process holds the
    directory. problems: one sentence for each thing in the directory that is not as a run leaves it.
    """

    directory: Path
    values: dict[str, Any]
    config: Config
    environment: dict[str, Any]
    steps: list[Line]
    validations: list[Line]
    saves: list[Line]
    running: bool
    problems: list[str]

    @property
    def last_step(self) -> int:
        """The newest step with a line; 0 before the first."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def tokens(self) -> int:
        """Consumed at the last step."""
        return int(self.steps[-1]["tokens"]) if self.steps else 0

    @property
    def finished(self) -> bool:
        return self.last_step >= self.config.train.steps

    @property
    def status(self) -> str:
        """In words."""
        if self.finished:
            return "finished"
        return f"{'still going' if self.running else 'stopped'} at step {self.last_step} of {self.config.train.steps}"

    @cached_property
    def model(self) -> Model:
        """The run's model, without memory; in bf16, as it would be served."""
        with torch.device("meta"):
            return Model(self.config.model, torch.bfloat16)


def read(directory: Path) -> Record:
    """Raises Refused where `directory` is no run, or its configuration cannot be read."""
    values = _read_config(directory)
    try:
        config = run_config.read(values)
    except Refused as refusal:
        raise Refused(f"{directory}/config.yaml is of another version or was edited: {refusal}") from None
    running = is_locked(directory / ".lock")
    problems: list[str] = []
    lines = _read_metrics(directory / "metrics.jsonl", running, problems)
    steps = _one_a_step([line for line in lines if "loss" in line and "tokens" in line])
    if not steps:
        problems.append("it has no step in metrics.jsonl yet")
    elif [line["step"] for line in steps] != list(range(1, len(steps) + 1)):
        problems.append("steps are missing from metrics.jsonl")
    return Record(
        directory=directory,
        values=values,
        config=config,
        environment=_read_environment(directory / "environment.json", problems),
        steps=steps,
        validations=_one_a_step([line for line in lines if "val_loss" in line]),
        saves=_one_a_step([line for line in lines if "seconds_save" in line]),
        running=running,
        problems=problems,
    )


def _read_config(directory: Path) -> dict[str, Any]:
    file = directory / "config.yaml"
    if not directory.is_dir():
        raise Refused(f"{directory} is {'a file' if directory.exists() else 'not there'}; name the directory of a run.")
    if not file.is_file():
        inside = sorted(path.parent.name for path in directory.glob("*/config.yaml"))
        hint = f"the runs in it are {', '.join(inside)}" if inside else "name the run.dir of a run"
        raise Refused(f"{directory} is not a run, because it has no config.yaml; {hint}.")
    try:
        values = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise Refused(f"{file} cannot be read ({type(error).__name__}); repair it or leave this run out.") from None
    if not isinstance(values, dict):
        raise Refused(f"{file} holds no configuration; repair it or leave this run out.")
    return values


def _read_metrics(file: Path, running: bool, problems: list[str]) -> list[Line]:
    """The lines that can be read; while a run is going, its last one may still be under way."""
    text = file.read_text(errors="replace") if file.is_file() else ""
    lines, unreadable = [], 0
    for raw in text.splitlines(keepends=True):
        try:
            line = json.loads(raw)
            validation.sources(line), validation.positions(line)  # a line that these cannot read is left out here
            lines.append({key: _number(value) for key, value in line.items()} | {"step": int(line["step"])})
        except (ValueError, TypeError, KeyError, AttributeError):
            unreadable += not (running and not raw.endswith("\n"))
    if unreadable:
        problems.append(f"{unreadable} line(s) of metrics.jsonl cannot be read and are left out")
    return lines


def _number(value: Any) -> Any:
    """JSON has no NaN and no infinity, so a run writes these as text."""
    return float(value) if value in ("nan", "inf", "-inf") else value


def _one_a_step(lines: list[Line]) -> list[Line]:
    """By increasing step; of a step that was written twice, the later line."""
    by_step = {line["step"]: line for line in lines}
    return [by_step[step] for step in sorted(by_step)]


def _read_environment(file: Path, problems: list[str]) -> dict[str, Any]:
    try:
        environment = json.loads(file.read_text())
    except (OSError, ValueError):
        problems.append("environment.json is missing or cannot be read, so the machine is not known")
        return {}
    return environment if isinstance(environment, dict) else {}
