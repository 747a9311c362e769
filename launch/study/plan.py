"""Which runs a study is made of, and which of them can begin: an arm's own follow the trials that choose a setting."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from conf.compose import overrides
from launch.study.queue import Job, reached, run_name
from launch.study.results import Results

TRIAL_SEED = 1_000_000
"""Of every trial, and of no run that counts: what was chosen on a seed would flatter it."""


@dataclass(frozen=True)
class Command:
    """How the runs of an arm are made. arguments: of `python -m train`, all but the study's own. steps: of one run."""

    arguments: list[str]
    steps: int


class Plan:
    """The runs of the arms that `commands` names, in `out`. known: what there is, which grows as runs end.

    A trial that failed in an earlier start is made again, as other runs are, unless runs of its arm have begun: with
    another value chosen, an arm would be made of runs that differ in it.
    """

    def __init__(self, known: Results, commands: Mapping[str, Command], out: Path) -> None:
        self.known, self._commands, self._out = known, commands, out
        self._given: set[tuple[str, int, float | None]] = set()
        study = known.study
        self._values: Sequence[float] = study.tuning.values if study.tuning else ()
        known.trials = [trial for trial in known.trials if trial.loss is not None or self._has_begun(trial.arm)]
        self.num_runs = len(commands) * (len(self._values) + study.seeds)
        self.steps = sum(command.steps for command in commands.values()) * (len(self._values) + study.seeds)

    def ready(self) -> list[Job]:
        """Those that can begin and were not given before."""
        new = [job for job in [*self._trials(), *self._runs()] if (job.arm, job.seed, job.trial) not in self._given]
        self._given.update((job.arm, job.seed, job.trial) for job in new)
        return new

    def left(self) -> int:
        """Runs that are neither done nor failed. Those of an arm whose every trial failed will never be."""
        known = self.known
        trials = sum(not known.tried(arm, value) for arm in self._commands for value in self._values)
        arms = [arm for arm in self._commands if not self._hopeless(arm)]
        seeds = range(known.study.seeds)
        return trials + sum(
            not known.has(arm, seed) and run_name(arm, seed) not in known.failed for arm in arms for seed in seeds
        )

    def reached(self) -> int:
        """Steps that all runs have behind them."""
        folders = [*(_trial(value) for value in self._values), *(_seed(i) for i in range(self.known.study.seeds))]
        return sum(
            reached(self._directory(arm, folder), command.steps)
            for arm, command in self._commands.items()
            for folder in folders
        )

    def _hopeless(self, arm: str) -> bool:
        tried = bool(self._values) and all(self.known.tried(arm, value) for value in self._values)
        return tried and self.known.tuned(arm) is None

    def _has_begun(self, arm: str) -> bool:
        folders = self._directory(arm, "").glob(_seed("*"))
        return any(folders) or any(run.arm == arm for run in self.known.runs)

    def _directory(self, arm: str, folder: str) -> Path:
        return self._out / "runs" / arm / folder

    def _trials(self) -> Iterator[Job]:
        for value in self._values:
            for arm in self._commands:
                if not self.known.tried(arm, value):
                    yield self._job(arm, TRIAL_SEED, _trial(value), value, trial=value)

    def _runs(self) -> Iterator[Job]:
        for seed in range(self.known.study.seeds):
            for arm in self._commands:
                tuned = self.known.tuned(arm)
                if not self.known.has(arm, seed) and (tuned is not None or not self._values):
                    yield self._job(arm, seed, _seed(seed), tuned)

    def _job(self, arm: str, seed: int, folder: str, value: float | None, trial: float | None = None) -> Job:
        command, tuning = self._commands[arm], self.known.study.tuning
        directory = self._directory(arm, folder)
        given = {} if tuning is None or value is None else {tuning.key: value}
        own = overrides({**given, "train.seed": seed, "run.dir": str(directory)})
        return Job(
            arm, seed, directory, [sys.executable, "-m", "train", *command.arguments, *own], command.steps,
            trial=trial, tuned=value,
        )  # fmt: skip


def _trial(value: float) -> str:
    return f"trial_{value}"


def _seed(seed: int | str) -> str:
    return f"seed_{seed}"
