"""`python -m launch submit`: check a run whole, freeze what it needs into its directory, and hand it to SLURM."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from conf.compose import compose
from conf.schema import Refused, build
from launch.arguments import Parser
from launch.slurm import environment, scheduler
from launch.slurm.cluster import Submission
from launch.slurm.script import Job, render


def main(arguments: list[str]) -> int:
    """Returns 0 once the job is submitted, or its script printed. Raises Refused, with nothing written."""
    parser = Parser("python -m launch submit", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="check all, and print the script instead")
    parser.add_argument("overrides", nargs="*", help="as for python -m train, and cluster=NAME cluster.KEY=… nodes=N")
    options = parser.parse_args(arguments)
    values = compose(options.overrides, "submit")
    submission = build(Submission, {key: values.pop(key) for key in ("cluster", "nodes") if key in values}, "")
    config = _check(values, submission.world_size)
    place = Path.cwd()
    job = Job((place / values["run"]["dir"]).resolve(), place)
    python = shlex.split(submission.cluster.python or sys.executable)
    packages = _environment(python)
    script = render(job, submission, python)
    try:
        print(scheduler.check(script, submission.cluster), file=sys.stderr)
    except scheduler.NoScheduler as silence:
        if not options.dry_run:
            raise
        print(f"SLURM was not asked: {silence}", file=sys.stderr)
    if options.dry_run:
        print(script, end="")
        return 0
    _refuse_a_second(job)
    _freeze(job, config, packages, script)
    number = scheduler.submit(job.script, submission.cluster)
    with (job.folder / "submitted.jsonl").open("a") as file:
        file.write(json.dumps({"job": number, "nodes": submission.nodes, "time": round(time.time())}) + "\n")
    status = shlex.join(["python", "-m", "launch", "status", values["run"]["dir"]])
    print(f"job {number}; `{status}` says how it goes.")
    return 0


def _check(values: dict[str, Any], world_size: int) -> dict[str, Any]:
    """The resolved configuration. Raises Refused for all that the job itself would refuse for."""
    from train import config as run_config

    config = run_config.read(values)
    # here: these take torch, whose import takes seconds, and most mistakes are refused by now
    from train.run import check
    from train.rundir import refuse_changes

    check(config, world_size)
    refuse_changes(Path(config.run.dir), config)
    return asdict(config)


def _environment(python: list[str]) -> str:
    """What `python`, which may be another one than this, has installed. Raises Refused where it does not run."""
    command = [*python, environment.__file__]  # by its file: what lies beside this code is not installed on the nodes
    variables = {**os.environ, "PYTHONSAFEPATH": "1"}
    try:
        return subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        last = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        raise Refused(
            f"cluster.python ({shlex.join(python)}) does not run here: {last}; name a Python that all nodes have."
        ) from None


def _refuse_a_second(job: Job) -> None:
    queue = scheduler.jobs()
    if queue is None:
        raise Refused(f"squeue does not say whether {job.run} has a job already; try again once it answers.")
    for queued in queue:
        if job.submitted_as(queued.script):
            raise Refused(
                f"{job.run} has job {queued.number} already ({queued.state.lower()}); "
                f"wait for it, or end it first with scancel {queued.number}."
            )


def _freeze(job: Job, config: dict[str, Any], packages: str, script: str) -> None:
    """Write what the job runs, so that nothing that is edited from now on reaches it. Raises Refused."""
    from train.rundir import REVISION, revision, snapshot_code, write_whole

    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        archive, unpacked = job.folder / snapshot_code(job.folder), job.folder / ".code.partial"
        shutil.rmtree(unpacked, ignore_errors=True)
        with tarfile.open(archive) as packed:
            packed.extractall(unpacked, filter="data")
        (unpacked / REVISION).write_text(json.dumps(revision()) + "\n")
        shutil.rmtree(job.code, ignore_errors=True)
        unpacked.rename(job.code)
        archive.unlink()
        write_whole(job.config, yaml.safe_dump(config, sort_keys=False))
        write_whole(job.environment, packages)
        write_whole(job.script, script)
    except OSError as error:
        raise Refused(f"run.dir {job.run} cannot be written ({error.strerror}); choose another directory.") from None
