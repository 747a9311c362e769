"""Runs side by side, each in a process of its own with one thread."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from launch.lock import is_locked
from train.rundir import LOCK

PATIENCE = 60.0  # seconds to save in, once asked to stop


@dataclass(frozen=True)
class Job:
    """One run. command: that makes it, and goes on with it where its directory is there already. steps: in all."""

    arm: str
    seed: int
    directory: Path
    command: list[str]
    steps: int

    @property
    def name(self) -> str:
        return f"{self.arm}, seed {self.seed}"

    @property
    def said(self) -> Path:
        """What its process wrote, which may end before it has a log."""
        return self.directory.with_suffix(".txt")

    def reached(self) -> int:
        """Steps that it has behind it, by its metrics; no more than there are, as a killed run trains some twice."""
        with contextlib.suppress(OSError):
            return min(self.steps, (self.directory / "metrics.jsonl").read_bytes().count(b'"grad_norm"'))
        return 0

    def why(self) -> str:
        """The last thing it said of itself."""
        with contextlib.suppress(OSError):
            lines = [line for line in self.said.read_text(errors="replace").splitlines() if line.strip()]
            complaints = [line for line in lines if line.startswith(("refused: ", "failed: "))]
            return (complaints or lines or ["it said nothing"])[-1]
        return "it said nothing"


class Ended(NamedTuple):
    """A run whose process has ended, and its exit code."""

    job: Job
    code: int


class Queue:
    """At most `workers` at once, in the order given.

    Leaving the context asks those that run to save and end, and waits.
    """

    def __init__(self, jobs: Sequence[Job], workers: int) -> None:
        self.waiting, self.workers = list(jobs), workers
        self.running: dict[subprocess.Popen[bytes], Job] = {}

    def __enter__(self) -> Queue:
        return self

    def __exit__(self, *raised: object) -> None:
        for process in self.running:
            process.terminate()
        until = time.monotonic() + PATIENCE
        for process in self.running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
            process.kill()
            process.wait()

    def ended(self, until: float) -> Iterator[Ended | None]:
        """Those that end, as they do, and None several times a second. Stops at `until`, by the monotonic clock."""
        while (self.waiting or self.running) and time.monotonic() < until:
            self._start()
            time.sleep(0.2)
            over = [process for process in self.running if process.poll() is not None]
            for process in over:
                yield Ended(self.running.pop(process), process.returncode)
            yield None

    def _start(self) -> None:
        for job in list(self.waiting):
            if len(self.running) >= self.workers:
                return
            if is_locked(job.directory / LOCK):  # by a process that outlived an earlier start of the study
                continue
            self.waiting.remove(job)
            job.directory.parent.mkdir(parents=True, exist_ok=True)
            with job.said.open("wb") as said:
                process = subprocess.Popen(
                    job.command,
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C reaches this process alone, which asks for an orderly end
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
            self.running[process] = job
