"""The exact script of a job: slurm/train.sbatch with one cluster's options and one run's settings in their places."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from launch.slurm.cluster import Submission

TEMPLATE = Path(__file__).parents[2] / "slurm" / "train.sbatch"
BEGIN, END = "# Settings", "# End of settings"


@dataclass(frozen=True)
class Job:
    """Where the files of a job lie. run: the run directory. place: the directory that it was submitted from, and runs
    in. Both are absolute."""

    run: Path
    place: Path

    @property
    def folder(self) -> Path:
        """What is frozen, and the logs."""
        return self.run / "job"

    @property
    def script(self) -> Path:
        return self.folder / "train.sbatch"

    @property
    def code(self) -> Path:
        return self.folder / "code"

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def environment(self) -> Path:
        return self.folder / "environment.json"

    def submitted_as(self, script: Path) -> bool:
        """Whether `script`, as SLURM names what was submitted, is this job's, through whatever links."""
        return script.resolve() == self.script.resolve()


def render(job: Job, submission: Submission, python: list[str]) -> str:
    """The script. python: the command that starts the interpreter on the nodes."""
    lines = TEMPLATE.read_text().splitlines()
    body = [line for line in lines[1:] if not line.startswith("#SBATCH")]
    begin, end = body.index(BEGIN), body.index(END)
    return "\n".join(
        [lines[0], *_options(job, submission), *body[:begin], *_settings(job, submission, python), *body[end:], ""]
    )


def _options(job: Job, submission: Submission) -> list[str]:
    options = [
        f"--job-name={job.run.name}",
        f"--chdir={job.place}",
        f"--output={str(job.folder).replace('%', '%%')}/%j.log",
        "--requeue",
        "--open-mode=append",
        *submission.cluster.directives(submission.nodes),
    ]
    return [f"#SBATCH {shlex.quote(option)}" for option in options]


def _settings(job: Job, submission: Submission, python: list[str]) -> list[str]:
    cluster = submission.cluster
    return [
        BEGIN,
        f"python=({shlex.join(python)})",
        f"attempts={cluster.attempts}",
        f"crashes={cluster.crashes}",
        f"wait={cluster.wait}",
        f"environment={shlex.quote(str(job.environment))}",
        f"run={shlex.quote(str(job.run))}",
        "export PYTHONSAFEPATH=1  # the code in the working directory is not the frozen one",
        f"export PYTHONPATH={shlex.quote(str(job.code))}${{PYTHONPATH:+:$PYTHONPATH}}",
        *(f"export {name}={shlex.quote(str(value))}" for name, value in cluster.environment.items()),
        *cluster.setup,
        f"set -- --config {shlex.quote(str(job.config))}",
    ]
