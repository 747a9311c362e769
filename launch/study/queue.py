"""Runs side by side, each in a process of its own with one thread, shared out among the GPUs that there are."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from launch.lock import is_locked
from train.rundir import LOCK

PATIENCE = 60.0  # seconds to save in, once asked to stop


@dataclass(frozen=True)
class Job:
    """One run. command: that makes it, and goes on with it where its directory is there already. steps: in all.

    tuned: the value that it has of the setting that trials choose. trial: the same, where it is one of them; None for a
    run that counts.
    """

    arm: str
    seed: int
    directory: Path
    command: list[str]
    steps: int
    trial: float | None = None
    tuned: float | None = None

    @property
    def name(self) -> str:
        return run_name(self.arm, self.seed) if self.trial is None else f"{self.arm}, trial of {self.trial}"

    @property
    def said(self) -> Path:
        """What its process wrote, which may end before it has a log."""
        return self.directory.with_name(f"{self.directory.name}.txt")

    def why(self, code: int = 1) -> str:
        """The last thing it said of itself; code: with which its process ended, below 0 where it could say nothing."""
        if code < 0:
            return f"its process was killed by signal {-code}, perhaps for want of memory."
        with contextlib.suppress(OSError):
            lines = [line for line in self.said.read_text(errors="replace").splitlines() if line.strip()]
            complaints = [line for line in lines if line.startswith(("refused: ", "failed: "))]
            return (complaints or lines or ["it said nothing"])[-1]
        return "it said nothing"


def run_name(arm: str, seed: int) -> str:
    """As failures name it."""
    return f"{arm}, seed {seed}"


def reached(directory: Path, steps: int) -> int:
    """Steps that a run has behind it, by its metrics; no more than it has, as a killed run trains some twice."""
    with contextlib.suppress(OSError):
        return min(steps, (directory / "metrics.jsonl").read_bytes().count(b'"grad_norm"'))
    return 0


class Ended(NamedTuple):
    """A run whose process has ended, and its exit code."""

    job: Job
    code: int


class Queue:
    """At most `workers` at once: trials first, then by seed, so that what is there when time is up can be compared.

    gpus: ids; each run sees the one that fewest others use. Without any, a run sees what this process sees.
    Leaving the context asks those that run to save and end, and waits.
    """

    def __init__(self, workers: int, gpus: Sequence[str] = ()) -> None:
        self.waiting: list[Job] = []
        self.workers, self.gpus = workers, list(gpus)
        self.running: dict[subprocess.Popen[bytes], Job] = {}
        self._gpu: dict[subprocess.Popen[bytes], str] = {}

    def add(self, jobs: Iterable[Job]) -> None:
        self.waiting = sorted([*self.waiting, *jobs], key=lambda job: (job.trial is None, job.seed))

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
            if is_locked(job.directory / LOCK):  # by a process that no study began
                continue
            gpu = self._freest_gpu()
            if (process := _start(job, gpu)) is None:
                continue
            self.waiting.remove(job)
            self.running[process] = job
            if gpu:
                self._gpu[process] = gpu

    def _freest_gpu(self) -> str | None:
        taken = [self._gpu[process] for process in self.running if process in self._gpu]
        return min(self.gpus, key=taken.count, default=None)


def _start(job: Job, gpu: str | None) -> subprocess.Popen[bytes] | None:
    """The job's process; None while one is there that outlived an earlier start of the study.

    What it writes to is locked before it begins and until it is gone: it locks its directory only seconds later.
    """
    job.directory.parent.mkdir(parents=True, exist_ok=True)
    with job.said.open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        with job.said.open("wb") as said:
            return subprocess.Popen(
                job.command,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                pass_fds=[lock.fileno()],  # and with it the lock, which this process lets go of
                start_new_session=True,  # Ctrl-C reaches this process alone, which asks for an orderly end
                env={**os.environ, "OMP_NUM_THREADS": "1", **({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})},
            )


def visible_gpus() -> list[str]:
    """Ids as CUDA_VISIBLE_DEVICES names them; none on a machine without."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu.strip()]
    return [str(i) for i in range(torch.cuda.device_count())]
