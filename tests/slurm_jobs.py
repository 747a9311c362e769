"""Jobs of the tests' SLURM: submitted, asked for their status, and what each attempt said in the end."""

from __future__ import annotations

import re
from pathlib import Path

from tests import forked
from tests.slurm_cluster import SlurmCluster


def launch(slurm: SlurmCluster, folder: Path, *arguments: str, path: str | None = None) -> tuple[int, str]:
    """`python -m launch` with these arguments in `folder`: the exit code, and what it prints."""
    output = folder.parent / f"{folder.name}_launch.txt"
    variables = {**slurm.environment, **({"PATH": path} if path is not None else {})}
    process = forked.start("launch", arguments, folder, output, variables)
    process.join()
    printed = output.read_text()
    output.unlink()
    return process.exitcode or 0, printed


def submit(slurm: SlurmCluster, folder: Path, *arguments: str) -> int:
    """The number of the job."""
    code, printed = launch(slurm, folder, "submit", *arguments)
    assert code == 0, printed
    return int(re.findall(r"^job (\d+);", printed, re.MULTILINE)[0])


def status(slurm: SlurmCluster, folder: Path, run: str) -> str:
    """Its line, from the second word on."""
    code, printed = launch(slurm, folder, "status", run)
    assert code == 0, printed
    return " ".join(printed.split()[1:])


def attempt_log(run: Path, job: int, attempt: int) -> str:
    file = run / "job" / f"{job}_attempt_{attempt}.log"
    return file.read_text() if file.exists() else ""


def verdicts(run: Path, job: int, attempt: int) -> list[str]:
    return re.findall(rf"^job {job}, attempt {attempt}, (exit .*)$", attempt_log(run, job, attempt), re.MULTILINE)


def verdict(run: Path, job: int, attempt: int) -> str:
    """The last line of an attempt: from `exit CODE` on."""
    lines = verdicts(run, job, attempt)
    assert lines, f"attempt {attempt} has said nothing:\n{attempt_log(run, job, attempt)}"
    return str(lines[-1])
