"""`python -m launch status [DIR...]`: what runs, what waits and for what, what ended and why."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from conf.schema import Refused
from launch.arguments import Parser
from launch.lock import is_locked
from launch.slurm import scheduler
from launch.slurm.scheduler import Queued
from launch.slurm.script import Job

END = re.compile(r"job (?P<job>\d+), attempt (?P<attempt>\d+), exit (?P<code>\d+): (?P<why>.*)")
REQUEUED = "; requeued"  # how what an attempt says ends, if its job goes on
WORDS = {0: "done", 2: "refused", 75: "stopped"}
TAIL = 65536  # bytes at the end of a file in which its last lines are looked for


@dataclass(frozen=True)
class Status:
    """Of one run. word: runs, waits, done, stopped, failed, refused, or unknown where only SLURM could tell. what: the
    rest of the line."""

    run: Path
    word: str
    what: str


def main(arguments: list[str]) -> int:
    """Returns 0. Raises Refused where a directory is not there."""
    parser = Parser("python -m launch status", description=__doc__)
    parser.add_argument(
        "dirs", nargs="*", type=Path, metavar="DIR", help="runs, or folders of runs [runs, and the queue]"
    )
    options = parser.parse_args(arguments)
    queue = scheduler.jobs()
    found = [status(run, queue) for run in _runs(options.dirs, queue or [])]
    width = max((len(str(one.run)) for one in found), default=0)
    for one in found:
        print(f"{one.run!s:{width}}  {one.word:8}{one.what}")
    if not found:
        print("no runs here; name their directories.")
    if queue is None:
        print("SLURM does not answer on this machine, so this is what the runs' own files say.")
    return 0


def _runs(named: list[Path], queue: list[Queued]) -> list[Path]:
    """Run directories, in order, each once."""
    found: dict[Path, Path] = {}
    for folder in named or [Path("runs")]:
        if named and not folder.is_dir():
            raise Refused(
                f"{folder} is {'a file' if folder.exists() else 'not there'}; name a run or a folder of runs."
            )
        inside = [folder] if _is_run(folder) else sorted(filter(_is_run, folder.glob("*")))
        if named and not inside:
            raise Refused(f"{folder} is not a run and holds none; name a run.dir, or a folder of them.")
        found |= {run.resolve(): run for run in inside}
    if not named:
        for queued in queue:
            run = queued.script.parent.parent
            if queued.script == Job(run, run).script and _is_run(run):
                found.setdefault(run.resolve(), run)
    return list(found.values())


def _is_run(folder: Path) -> bool:
    """Started, or submitted; a folder of runs may hold one that is named job."""
    return (folder / "config.yaml").is_file() or Job(folder, folder).script.is_file()


def status(run: Path, queue: list[Queued] | None) -> Status:
    """By the queue where the run is in it, else by what its last attempt left. queue: None where SLURM is silent."""
    job = Job(run.resolve(), run)
    for queued in queue or []:
        if job.submitted_as(queued.script):
            return _queued(run, queued)
    if is_locked(run / ".lock"):
        return Status(run, "runs", _progress(run))
    submitted = _last(job.folder / "submitted.jsonl", "job")
    if submitted is None or _continued(run, submitted):
        return _ended_by_itself(run)
    if queue is None and _may_live(run, submitted):
        return Status(run, "unknown", f"only SLURM knows whether job {submitted} waits or runs; {_progress(run)}")
    return _ended(run, submitted)


def _continued(run: Path, number: int) -> bool:
    """Whether the run was taken up without SLURM after the job: a job says why it ended once its ranks have."""
    told = _newest_log(run, number) or run / "job" / "submitted.jsonl"
    try:
        return (run / "exit.json").stat().st_mtime_ns > told.stat().st_mtime_ns
    except OSError:
        return False


def _may_live(run: Path, number: int) -> bool:
    """Whether the job may be in the queue, by what it left."""
    said = _verdict(_newest_log(run, number))
    return said is None or said["why"].endswith(REQUEUED)


def _queued(run: Path, queued: Queued) -> Status:
    if queued.state == "PENDING":
        before = _progress(run) if (run / "metrics.jsonl").exists() else "not started yet"
        return Status(run, "waits", f"job {queued.number}: {queued.waits_for}; {before}")
    attempt = _number(_newest_log(run, queued.number))
    ending = "" if queued.state == "RUNNING" else f" ({queued.state.lower()})"
    return Status(run, "runs", f"job {queued.number}{ending}, attempt {attempt}, on {queued.nodes}; {_progress(run)}")


def _ended(run: Path, number: int) -> Status:
    """A job that SLURM does not hold any more."""
    log = _newest_log(run, number)
    if log is None:
        reason = (
            f"job {number} left no log: it was cancelled before it started, or its node does not see {run.resolve()}"
        )
        return Status(run, "failed", f"{reason}; {_resumes(run)}")
    found = _verdict(log)
    if found is None:
        said = _tail(run / "job" / f"{number}.log") or _tail(log)
        why = (
            f"job {number} ended without a word (its node failed, or it was killed); its last line: {_last_line(said)}"
        )
        return Status(run, "failed", f"{why}; {_resumes(run)}")
    word, why = WORDS.get(int(found["code"]), "failed"), found["why"]
    if why.endswith(REQUEUED):
        word, why = "stopped", f"{why}, and then cancelled"
    what = f"job {number}, attempt {found['attempt']}: {why}"
    return Status(run, word, _progress(run) if word == "done" else f"{what}; {_resumes(run)}")


def _ended_by_itself(run: Path) -> Status:
    """A run that was not submitted, or went on without SLURM."""
    try:
        ended = json.loads((run / "exit.json").read_text())
        code, reason = int(ended["code"]), str(ended["reason"])
    except (OSError, ValueError, KeyError, TypeError):
        last = _last_line(_tail(run / "log.txt"))
        return Status(run, "failed", f"it ended without a word (killed?); its last line: {last}; {_resumes(run)}")
    word = WORDS.get(code, "failed")
    return Status(run, word, _progress(run) if word == "done" else f"{reason}; {_resumes(run)}")


def _progress(run: Path) -> str:
    """How far the run is."""
    return f"step {_last(run / 'metrics.jsonl', 'step') or 0} of {_steps(run)}"


def _resumes(run: Path) -> str:
    """From where the same command would go on."""
    names = (path.name.removeprefix("step_") for path in (run / "checkpoints").glob("step_*"))
    step = max((int(name) for name in names if name.isdigit()), default=0)
    return f"started again, it resumes from step {step} of {_steps(run)}" if step else "it has no checkpoint"


def _steps(run: Path) -> str:
    for file in (run / "job" / "config.yaml", run / "config.yaml"):
        try:
            return str(yaml.safe_load(file.read_text())["train"]["steps"])
        except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
            continue
    return "?"


def _newest_log(run: Path, number: int) -> Path | None:
    """Of the last attempt of a job."""
    return max((run / "job").glob(f"{number}_attempt_*.log"), key=_number, default=None)


def _verdict(log: Path | None) -> re.Match[str] | None:
    """What an attempt said of its end."""
    lines = _tail(log) if log is not None else []
    return next((match for line in reversed(lines) if (match := END.fullmatch(line))), None)


def _number(log: Path | None) -> int:
    return int(log.stem.rpartition("_")[2]) if log is not None else 0


def _tail(file: Path) -> list[str]:
    try:
        with file.open("rb") as handle:
            handle.seek(max(0, file.stat().st_size - TAIL))
            return [line for line in handle.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        return []


def _last(file: Path, key: str) -> int | None:
    """The number of that key in the last whole line of JSON that has one."""
    for line in reversed(_tail(file)):
        with contextlib.suppress(ValueError, TypeError, KeyError):
            return int(json.loads(line)[key])
    return None


def _last_line(lines: list[str]) -> str:
    return lines[-1].strip() if lines else "(none)"
