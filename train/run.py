"""Sets a run up, trains, and says in one sentence how it ended.

All that may be refused comes before anything is written.
"""

from __future__ import annotations

import logging
import os
import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch

from conf.schema import Refused
from data.config import Probes
from data.course import Course, Standing
from data.loader import Loader
from models import cost
from models.cores import approximate
from models.weights import is_weights_alone
from train import kernels, optimizer, pretrained, rundir, statistics
from train.checkpoint import Checkpoints, SaveFailed
from train.config import Config
from train.engines.torch import DTYPES, Engine
from train.failure import tell
from train.loop import Diverged, Progress, Run, train
from train.metrics import Metrics, drop_after
from train.phases import stretches
from train.profiler import Profiler
from train.ranks import Ranks
from train.rundir import DONE, FAILED, INTERRUPTED, REFUSED
from train.stop import StopRequest, grace

log = logging.getLogger(__name__)


class Sources(NamedTuple):
    """What the run trains and validates on."""

    train: Course
    validation: Probes


def run(config: Config, ranks: Ranks) -> int:
    """Returns the exit code. Raises Refused where nothing was changed."""
    directory = Path(config.run.dir)
    # before anything that takes long: a signal that nobody handles would count as a crash
    stop = StopRequest(directory / "stop" if ranks.first else None)
    with ExitStack() as held:
        held.callback(stop.over)
        sources = ranks.together(lambda: check(config, ranks.world_size))
        if _stays_stopped(directory, ranks):
            return INTERRUPTED
        ranks.on_first(lambda: held.enter_context(rundir.locked(directory)))
        try:
            ranks.on_first(lambda: rundir.refuse_changes(directory, config))
            rundir.start_log(directory, ranks)
            prepared = _prepare(config, ranks, sources, stop, held)
            over = prepared.progress.is_over(config.train.steps)
            try:
                asked = train(prepared)
            except Diverged:  # on every rank alike; the checkpoint still being written is of a step before it
                _finish_saving(prepared.checkpoints)
                raise
            prepared.checkpoints.close()
            code, reason = (DONE, "done") if asked is None else (INTERRUPTED, f"asked to stop by {asked}")
            _take_leave(prepared, asked, over=over)
        except Refused as refusal:
            # an exit code of 2 does not survive torchrun, and the file there tells of an earlier start
            if ranks.first and "TORCHELASTIC_RUN_ID" in os.environ and (directory / "config.yaml").exists():
                rundir.write_exit(directory, REFUSED, str(refusal))
            raise
        except Exception as error:
            code, reason = FAILED, tell(error)
        if ranks.first:
            rundir.write_exit(directory, code, reason)
        return code


def _stays_stopped(directory: Path, ranks: Ranks) -> bool:
    """With --max-restarts torchrun starts workers anew that ended because they were asked to; they end again at once.

    Its first start of them removed what an earlier launch left in exit.json.
    """
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    (stopped,) = ranks.total(int(restarted and ranks.first and rundir.was_stopped(directory)))
    return stopped > 0


def _finish_saving(checkpoints: Checkpoints) -> None:
    """Without hiding why the run ends."""
    try:
        checkpoints.wait()
    except SaveFailed as failure:
        tell(failure)


def check(config: Config, world_size: int) -> Sources:
    """Everything that can be refused by looking alone, before there are ranks. Raises Refused."""
    mixture, probes = config.data.open()
    vocab = max(mixture.vocab, *(probe.source.vocab for probe in probes.values()), 0)
    if vocab > config.model.vocab:
        raise Refused(
            f"the data has token ids up to {vocab - 1}, but model.vocab is {config.model.vocab}; "
            f"set model.vocab to {vocab} or more."
        )
    if world_size % config.parallel.replicate:
        raise Refused(
            f"parallel.replicate ({config.parallel.replicate}) does not divide {world_size} ranks; take a divisor."
        )
    table = stretches(config.train, 0.0)
    for stretch in table:
        if stretch.rows % world_size:
            raise Refused(
                f"a step has {stretch.rows} windows, which {world_size} ranks cannot share evenly; "
                f"change the batch from step {stretch.start} on, or the number of ranks."
            )
    course = Course(mixture, [stretch.leg() for stretch in table], config.data.seed)
    for stretch in table:
        for name, probe in probes.items():
            try:
                Loader(probe.source, sequence_length=probe.length or stretch.sequence_length)
            except Refused as refusal:
                raise Refused(f"data.validation ({name}): {refusal}") from None
    if config.evaluate.samples is None and any(probe.source.num_tokens is None for probe in probes.values()):
        raise Refused("evaluate.samples is null, but some of the validation data is endless; give a number.")
    model = cost.meta(config.model)
    approximate.cores(config.train.approximate, model.attentions())
    chooses = any(attention.selector() for attention in model.trained_attentions())
    for stretch in table:
        for length in (stretch.sequence_length, *(probe.length or 0 for probe in probes.values())):
            model.refuse_longer(length)
        if stretch.attention == "warmup" and not chooses:
            raise Refused(
                f"attention is warmup from step {stretch.start} on, which trains what chooses alone, but no layer of "
                "the model chooses what it reads; take dense or sparse, or a scheme with an indexer."
            )
    return Sources(course, probes)


def _prepare(config: Config, ranks: Ranks, sources: Sources, stop: StopRequest, held: ExitStack) -> Run:
    """From checked input to a run that stands at its step; what is refused here is so before the first write."""
    directory = Path(config.run.dir)
    if config.run.deterministic:  # only then: the call imports a compiler
        torch.use_deterministic_algorithms(True)
    engine = Engine(config, ranks)
    checkpoints = Checkpoints(
        directory / "checkpoints",
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every,
        facts={**rundir.layout(ranks), "data": sources.train.fingerprint, "tokenizer": sources.train.tokenizer},
        grace=grace(),
    )
    engine.before_update = checkpoints.release
    progress = _start_weights(config, engine, checkpoints, sources.train)
    course = sources.train.resumed(Standing.read(progress.data)) if progress.step else sources.train
    metrics = None
    if ranks.first:
        rundir.settle(directory, config, rundir.describe_environment(config, ranks), progress.step)
        drop_after(directory / statistics.FILE, progress.step)
        metrics = Metrics(directory, config, progress.step, owes_validation=progress.owes_validation)
        held.callback(metrics.close)
        _introduce(config, ranks, progress.step)
    profiler = Profiler(config.train.profile, directory, ranks)
    held.callback(profiler.close)
    return Run(
        directory=directory,
        config=config,
        ranks=ranks,
        engine=engine,
        course=course,
        probes=sources.validation,
        checkpoints=checkpoints,
        stop=stop,
        metrics=metrics,
        learning_rate=optimizer.read(config.optimizer).learning_rate,
        profiler=profiler,
        progress=progress,
    )


def _start_weights(config: Config, engine: Engine, checkpoints: Checkpoints, course: Course) -> Progress:
    """The newest good checkpoint of this run, or the weights that train.init names, or none."""
    if checkpoints.latest() is not None:
        engine.initialise(among=())
        checkpoint = checkpoints.load({**engine.state(), "progress": {"step": 0, "owes_validation": False}})
        if checkpoint.facts.get("data") != course.fingerprint:
            raise Refused(
                f"{checkpoint.path} was trained on other data than data.train now names; "
                "name the same data, or choose another run.dir (train.init= starts from this run's weights)."
            )
        progress = Progress(**checkpoint.state["progress"])
        engine.load(checkpoint.state)
        log.info("resumed from step %d (%s)", checkpoint.step, checkpoint.path)
        return progress
    if config.train.init is not None:
        engine.initialise(among=(pretrained.AHEAD,))
        path, weights = Path(config.train.init), engine.state()["model"]
        (alone,) = engine.ranks.total(int(engine.ranks.first and is_weights_alone(path)))
        if alone:
            pretrained.load(path, weights, engine.ranks)
        else:
            checkpoint = checkpoints.load({"model": weights}, path, optional="model.mtp")
            path = checkpoint.path
            if engine.ranks.first:
                pretrained.tell_other_tokenizer(path, checkpoint.facts.get("tokenizer"), course.tokenizer)
        engine.load_weights(weights)
        log.info("started from the weights of %s", path)
        if engine.ranks.first:
            pretrained.tell_difference(path, config.model)
        return Progress()
    engine.initialise()
    return Progress()


def _take_leave(run: Run, asked: str | None, *, over: bool) -> None:
    """asked: by whom it was to stop. over: this start found nothing to do."""
    directory, step = run.directory, run.step
    if asked is not None:
        log.info("asked to stop by %s: saved step %d; the same command resumes", asked, step)
    elif over:
        log.info("%s was finished before, at step %d; a larger train.steps goes on from there", directory, step)
    else:
        report = shlex.join(["python", "-m", "launch", "report", str(directory), "--out", "runs/report"])
        log.info("done at step %d: %s; `%s` shows it", step, directory, report)


def _introduce(config: Config, ranks: Ranks, step: int) -> None:
    """What a person wants to know at the start, once."""
    model = cost.meta(config.model)
    counted = cost.parameters(model)
    log.info(
        "%s parameters, %s active; %.0f bytes of cache a token; %d rank(s) on %s; softmax core: %s%s; steps %d to %d",
        f"{counted.total:,}" + (f" (and {counted.mtp:,} of multi-token prediction)" if counted.mtp else ""),
        f"{counted.active:,}",
        cost.kv_bytes_per_token(model),
        ranks.world_size,
        ranks.device,
        config.train.core,
        "" if config.train.approximate is None else f", {config.train.approximate['scheme']} in training",
        step,
        config.train.steps,
    )
    phases = dict.fromkeys((stretch.attention, stretch.sequence_length) for stretch in stretches(config.train, 0.0))
    for line in kernels.told(model, config.train.core, DTYPES[config.train.compute], phases):
        log.info("%s", line)
