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

from conf.compose import compose, overrides
from conf.schema import Refused, build, unknown_choice
from launch.report.record import read
from launch.study import config, results
from launch.study.matching import arguments, match
from launch.study.plan import Command, Plan
from launch.study.queue import Job, Queue, visible_gpus
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
    for key in sorted(study.own_settings.union(*study.arms.values())):
        if any(argument.lstrip("+~").partition("=")[0] == key for argument in common):
            raise Refused(f"{key} is set by the study itself; leave it out.")
    known, commands = _prepare(study, common)
    results.go_on(out, known)
    plan = Plan(known, _chosen(commands, options, study), out)
    try:
        _write(known, out)
    except OSError as error:
        raise Refused(f"out={out} cannot be written ({error.strerror}); choose another folder.") from None
    done = plan.num_runs - plan.left()
    print(f"{len(known.arms)} arms, {plan.num_runs} runs, {done} of them done before; {out}", flush=True)
    _run(plan, options.workers or os.cpu_count() or 1, until, known, out)
    for name, why in known.failed.items():
        print(f"failed: {name}: {why}", file=sys.stderr)
    if left := plan.left():
        print(f"{left} run(s) are left; the same command goes on.", file=sys.stderr)
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
            values[key] = _number(key, text) if key in ("workers", "seeds", "minutes") else text
    return build(Options, values, ""), tuple(common)


def _number(key: str, text: str) -> object:
    """As YAML reads it; what is none is refused with the other options."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise Refused(f"{key} is '{text}', which cannot be read as a value.") from None


def _study(options: Options) -> config.Study:
    study = config.load(options.study)
    if options.seeds is not None:
        study = replace(study, seeds=options.seeds)
    return study


def _chosen(commands: dict[str, Command], options: Options, study: config.Study) -> dict[str, Command]:
    """Those of the arms that were asked for."""
    if options.arms is None:
        return commands
    names = options.arms.split(",")
    for name in names:
        if name not in study.arms:
            raise Refused(unknown_choice("arms", name, list(study.arms)))
    return {name: command for name, command in commands.items() if name in names}


def _prepare(study: config.Study, common: tuple[str, ...]) -> tuple[Results, dict[str, Command]]:
    """All arms, and how the runs of each are made. Raises Refused where one cannot be."""
    arms, commands, configs = {}, {}, {}
    for name, matched in match(study, common).items():
        mine = arguments(study, matched.settings, common)
        values = compose(mine)
        arms[name] = results.arm_of(matched, mine, study.context, values)
        configs[name] = run_config.read(values)
        commands[name] = Command(mine, configs[name].train.steps)
    if study.tuning is not None:
        for value in study.tuning.values:
            trial = overrides({study.tuning.key: value})
            run_config.read(compose([*commands[study.anchor].arguments, *trial]))
    configs[study.anchor].data.open()
    return Results(study, list(common), arms), commands


def _run(plan: Plan, workers: int, until: float, known: Results, out: Path) -> None:
    """Run what can begin, until all is done or the time is up."""
    told = began = time.monotonic()
    at_first = plan.reached()
    with Queue(workers, visible_gpus()) as queue:
        queue.add(plan.ready())
        for ended in queue.ended(until):
            if ended is not None:
                job, code = ended
                if code not in (DONE, INTERRUPTED):
                    known.failed[job.name] = why = job.why(code)
                    print(f"failed: {job.name}: {why}", file=sys.stderr, flush=True)
                if code != INTERRUPTED:
                    _record(job, code == DONE, known)
                    _write(known, out)
                    queue.add(plan.ready())
            elif time.monotonic() - told > TELL_EVERY:
                told = time.monotonic()
                print(_progress(plan, at_first, len(queue.running), told - began), flush=True)


def _record(job: Job, is_done: bool, known: Results) -> None:
    record = read(job.directory) if is_done else None
    if job.trial is not None:
        trial = results.trial_of(job.arm, job.trial, record)
        known.trials.append(trial)
        if is_done and trial.loss is None:
            known.failed[job.name] = "its last validation has no finite loss to choose by."
    elif record is not None:
        known.runs.append(results.run_of(job.arm, job.seed, record, job.tuned))


def _progress(plan: Plan, at_first: int, running: int, seconds: float) -> str:
    made, left = plan.reached(), plan.left()
    rate = (made - at_first) / seconds
    eta = f"{(plan.steps - made) / rate / 60:.1f} min to go" if rate > 0 else "starting"
    done = f"{plan.num_runs - left} of {plan.num_runs} runs done"
    return f"{done}, {running} running, {made / plan.steps:.0%} of the steps, {eta}"


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
