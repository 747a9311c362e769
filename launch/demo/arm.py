"""One arm of the demonstration: trained under torchrun, killed in mid-run, resumed by the same command."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from conf.compose import compose, overrides
from conf.schema import Refused
from launch.demo.processes import Launched, typed
from launch.report.record import Record, read
from models import checkpoint as checkpoints
from train import config as run_config
from train.config import Config
from train.rundir import refuse_changes

RANKS = 2


class ArmFailed(Exception):
    """An arm's training ended with an error; one sentence."""


@dataclass(frozen=True)
class Interruption:
    """step: the last with a line in metrics.jsonl when the run was killed. losses: by step, as written until then."""

    step: int
    losses: dict[int, float]

    @classmethod
    def load(cls, file: Path) -> Interruption | None:
        if not file.exists():
            return None
        values = json.loads(file.read_text())
        return cls(values["step"], {int(step): loss for step, loss in values["losses"].items()})

    def save(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)) + "\n")


@dataclass(frozen=True)
class Arm:
    """name: also the attention scheme's. directory: of the run. overrides: the rest of its command line."""

    name: str
    directory: Path
    overrides: tuple[str, ...]

    @property
    def arguments(self) -> list[str]:
        """Of `python -m train`."""
        own = {"experiment": "demo", "attention": self.name, "run.dir": str(self.directory)}
        return [*overrides(own), *self.overrides]

    @property
    def command(self) -> list[str]:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        # without an address the ranks look for each other by this machine's name, which a laptop's network may not know
        torchrun += ["--local-addr", "localhost", "--nproc-per-node", str(RANKS)]
        return [*torchrun, "-m", "train", *self.arguments]

    def config(self) -> Config:
        """Raises Refused where the settings are wrong, or the directory holds a run with others."""
        config = run_config.read(compose(self.arguments))
        refuse_changes(self.directory, config)
        return config

    def record(self) -> Record | None:
        """What there is of the run; None before it has begun."""
        return read(self.directory) if (self.directory / "config.yaml").exists() else None

    def is_finished(self) -> bool:
        record = self.record()
        return record is not None and record.finished and bool(record.validations) and not record.running

    def train(self) -> None:
        """To its end, from wherever it stands. Raises ArmFailed."""
        if self.is_finished():
            print(f"{self.name}: finished before")
            return
        with self._start() as launched:
            while (code := launched.wait(1.0)) is None:
                pass
        self._check(code, launched)

    def train_and_kill(self, every: int) -> Interruption | None:
        """Train, and kill all processes half-way between two checkpoints, which are `every` steps apart.

        Returns None if the run came to its end before it could be killed. Raises ArmFailed.
        """
        with self._start() as launched:
            while (code := launched.wait(0.1)) is None:
                if self._steps_at_risk() >= every // 2:
                    launched.kill()
                    record = read(self.directory)
                    return Interruption(record.last_step, {line["step"]: line["loss"] for line in record.steps})
        self._check(code, launched)
        return None

    def resumed_from(self) -> int | None:
        """The step at which the run was last taken up again, by its log."""
        found = re.findall(r"resumed from step (\d+)", (self.directory / "log.txt").read_text(errors="replace"))
        return int(found[-1]) if found else None

    def _start(self) -> Launched:
        print(f"$ {typed(self.command)}", flush=True)
        return Launched(self.name, self.command)

    def _check(self, code: int, launched: Launched) -> None:
        if code:
            why = launched.complaint or f"its lines above and {self.directory / 'log.txt'} say why."
            raise ArmFailed(f"{self.name} ended with exit code {code}; {why}")

    def _steps_at_risk(self) -> int:
        """Steps since the newest checkpoint: what a kill would lose. 0 before the first checkpoint."""
        newest = next(iter(checkpoints.complete(self.directory / "checkpoints")), None)
        if newest is None:
            return 0
        try:
            record = self.record()
        except Refused:  # config.yaml is being written
            return 0
        return record.last_step - checkpoints.step_of(newest) if record is not None else 0
