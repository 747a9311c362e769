"""`python -m launch study [study=NAME] out=DIR [workers=N] [seeds=N] [arms=NAME,…] [minutes=M] [overrides]`.

Trains every arm of conf/study/NAME.yaml (or of a file) with every seed and writes DIR/study.json, as runs end, and
DIR/study.md. The same command goes on where it was stopped. Further overrides are for every run.

`python -m launch study from=FILE out=DIR` trains nothing: tables and plots of a study.json.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from conf.compose import compose
from conf.schema import Refused, build, unknown_choice
from launch.report.record import read
from launch.study import config, results
from launch.study.matching import arguments, match
from launch.study.queue import Job, Queue
from launch.study.results import Results
from launch.study.tables import document
from train import config as run_config
from train.rundir import DONE, FAILED, INTERRUPTED, write_whole

DOCUMENT = "study.md"
TELL_EVERY = 10.0  # seconds


@dataclass(frozen=True)
class Options:
    """out: folder. study: its name. workers: runs at once, null for one a core. seeds: of each arm, null for as many as
    the study says. arms: these alone. minutes: after them, save and end with 75. source: a study.json to show."""

    out: str
    study: str = "cpu"
    workers: int | None = None
    seeds: int | None = None
    arms: str | None = None
    minutes: float | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        for name in ("workers", "seeds", "minutes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}, but it must be above 0")
        if not self.out:
            raise ValueError("out is empty; name a folder")


def main(given: list[str]) -> int:
    """Returns 0 done, 1 where a run failed, 75 where some are left. Raises Refused before anything is written."""
    if not given or "-h" in given or "--help" in given:
        print(f"usage: {__doc__}\n{Options.__doc__}")
        return DONE
    options, common = _options(given)
    if options.source is not None:
        return _show(options, common)
    until = float("inf") if options.minutes is None else time.monotonic() + 60 * options.minutes
    out = Path(options.out)
    study = _study(options)
    for key in ("run.dir", "train.seed", study.knob):
        if any(argument.lstrip("+~").partition("=")[0] == key for argument in common):
            raise Refused(f"{key} is set by the study itself; leave it out.")
    known, jobs = _prepare(study, out, common)
    results.go_on(out, known)
    left = [job for job in _chosen(jobs, options, study) if not known.has(job.arm, job.seed)]
    _write(known, out)
    print(f"{len(known.arms)} arms, {len(jobs)} runs, {len(jobs) - len(left)} of them done before; {out}", flush=True)
    interrupted = _run(left, options.workers or os.cpu_count() or 1, until, known, out)
    for name, why in known.failed.items():
        print(f"failed: {name}: {why}", file=sys.stderr)
    if interrupted:
        print(f"{interrupted} run(s) are left; the same command goes on.", file=sys.stderr)
        return INTERRUPTED
    return FAILED if known.failed else DONE


def _options(given: list[str]) -> tuple[Options, tuple[str, ...]]:
    values, common = {}, []
    for argument in given:
        key, equals, text = argument.partition("=")
        key = "source" if key == "from" else key
        if not equals or key not in Options.__dataclass_fields__:
            common.append(argument)
        elif key in values:
            raise Refused(f"{key}= is given twice; give it once.")
        else:
            values[key] = yaml.safe_load(text) if key in ("workers", "seeds", "minutes") else text
    return build(Options, values, ""), tuple(common)


def _study(options: Options) -> config.Study:
    study = config.load(options.study)
    if options.seeds is not None:
        study = replace(study, seeds=options.seeds)
    return study


def _chosen(jobs: list[Job], options: Options, study: config.Study) -> list[Job]:
    """Those of the arms that were asked for."""
    if options.arms is None:
        return jobs
    names = options.arms.split(",")
    for name in names:
        if name not in study.arms:
            raise Refused(unknown_choice("arms", name, list(study.arms)))
    return [job for job in jobs if job.arm in names]


def _prepare(study: config.Study, out: Path, common: tuple[str, ...]) -> tuple[Results, list[Job]]:
    """All arms and runs. Raises Refused where one cannot be."""
    arms, by_arm = {}, {}
    for name, matched in match(study, common).items():
        mine = arguments(study, matched.settings, common)
        values = compose(mine)
        arms[name] = results.arm_of(matched, mine, study.context, values)
        by_arm[name] = (mine, run_config.read(values))
    first = by_arm[study.anchor][1]
    first.data.open()
    jobs = []
    for seed in range(study.seeds):  # by seed first, so that what is there when time is up can be compared
        for name, (mine, read_config) in by_arm.items():
            directory = out / "runs" / name / f"seed_{seed}"
            command = [sys.executable, "-m", "train", *mine, f"train.seed={seed}", f"run.dir={directory}"]
            jobs.append(Job(name, seed, directory, command, read_config.train.steps))
    return Results(study, list(common), arms), jobs


def _run(jobs: list[Job], workers: int, until: float, known: Results, out: Path) -> int:
    """Run them; returns how many are left."""
    left, told, began = len(jobs), time.monotonic(), time.monotonic()
    at_first = sum(job.reached() for job in jobs)
    with Queue(jobs, workers) as queue:
        for ended in queue.ended(until):
            if ended is not None:
                job, code = ended
                if code == DONE:
                    known.runs.append(results.run_of(job.arm, job.seed, read(job.directory)))
                    left -= 1
                elif code != INTERRUPTED:
                    known.failed[job.name] = job.why()
                    left -= 1
                    print(f"failed: {job.name}: {job.why()}", file=sys.stderr, flush=True)
                _write(known, out)
            elif time.monotonic() - told > TELL_EVERY:
                told = time.monotonic()
                print(_progress(jobs, at_first, left, len(queue.running), told - began), flush=True)
    return left


def _progress(jobs: list[Job], at_first: int, left: int, running: int, seconds: float) -> str:
    steps, made = sum(job.steps for job in jobs), sum(job.reached() for job in jobs)
    rate = (made - at_first) / seconds
    eta = f"{(steps - made) / rate / 60:.1f} min to go" if rate > 0 else "starting"
    return f"{len(jobs) - left} of {len(jobs)} runs done, {running} running, {made / steps:.0%} of the steps, {eta}"


def _write(known: Results, out: Path) -> None:
    known.write(out)
    write_whole(out / DOCUMENT, document(known))


def _show(options: Options, common: tuple[str, ...]) -> int:
    if common:
        raise Refused(f"{common[0]} is for runs, but from= trains none; leave it out.")
    from launch.study.plots import PLOTS, draw  # here: training needs no matplotlib

    assert options.source is not None
    known, out = results.load(Path(options.source)), Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    pictures = draw(known)
    for plot in PLOTS:
        (out / plot.file).unlink(missing_ok=True)
    for picture in pictures:
        (out / picture.plot.file).write_bytes(picture.light)
    write_whole(out / DOCUMENT, document(known, [(p.plot.file, p.plot.title, p.plot.caption) for p in pictures]))
    print(f"{out / DOCUMENT}: {len(known.runs)} runs, {len(pictures)} plots.")
    return DONE
