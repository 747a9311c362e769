"""Sets a run up, trains, and says in one sentence how it ended."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path

import torch

from conf.schema import Refused
from data.loader import Loader
from data.source import Source
from models import cost
from train import optimizer, rundir
from train.checkpoint import Checkpoints
from train.config import Config
from train.engines.torch import Engine
from train.loop import DONE, Run, train
from train.metrics import Metrics
from train.phases import stretches
from train.ranks import Ranks
from train.stop import StopRequest

log = logging.getLogger("keyhole")


def run(config: Config, ranks: Ranks) -> tuple[int, str]:
    """Returns the exit code and the reason. Raises Refused where nothing was changed."""
    directory = Path(config.run.dir)
    with ExitStack() as stack:
        sources = ranks.together(lambda: _open_sources(config, ranks))
        if ranks.first:
            ranks.together(lambda: stack.enter_context(rundir.locked(directory)))
            ranks.together(lambda: rundir.settle(directory, config, ranks))
        else:
            ranks.together(lambda: None)
            ranks.together(lambda: None)
        rundir.start_log(directory, ranks)
        stop = StopRequest(directory, ranks)
        torch.use_deterministic_algorithms(config.run.deterministic)
        engine = Engine(config, ranks)
        checkpoints = Checkpoints(
            directory / "checkpoints",
            keep=config.checkpoint.keep,
            keep_every=config.checkpoint.keep_every,
            facts=rundir.describe_environment(config, ranks)["layout"],
        )
        step = _start_weights(config, engine, checkpoints)
        metrics = Metrics(directory, config, step) if ranks.first else None
        if ranks.first:
            _introduce(config, engine, ranks, step)
        try:
            code = train(
                Run(
                    config=config,
                    ranks=ranks,
                    engine=engine,
                    train_source=sources[0],
                    validation_source=sources[1],
                    checkpoints=checkpoints,
                    stop=stop,
                    metrics=metrics,
                    learning_rate=optimizer.read(config.optimizer).learning_rate,
                    step=step,
                )
            )
            checkpoints.close()
        finally:
            if metrics is not None:
                metrics.close()
        return code, "done" if code == DONE else f"asked to stop by {stop.reason}"


def _open_sources(config: Config, ranks: Ranks) -> tuple[Source, Source | None]:
    """Everything that can be refused by looking alone, before anything is written."""
    sources = config.data.open_train(), config.data.open_validation()
    for source in filter(None, sources):
        if source.vocab > config.model.vocab:
            raise Refused(
                f"the data has token ids up to {source.vocab - 1}, but model.vocab is {config.model.vocab}; "
                f"set model.vocab to {source.vocab} or more."
            )
    for stretch in stretches(config.train, 0.0):
        if stretch.rows % ranks.world_size:
            raise Refused(
                f"a step has {stretch.rows} windows, which {ranks.world_size} ranks cannot share evenly; "
                "change train.batch_tokens or the number of ranks."
            )
        for source in filter(None, sources):
            Loader(source, sequence_length=stretch.sequence_length)
    if ranks.world_size % config.parallel.replicate:
        raise Refused(f"parallel.replicate ({config.parallel.replicate}) does not divide {ranks.world_size} ranks.")
    return sources


def _start_weights(config: Config, engine: Engine, checkpoints: Checkpoints) -> int:
    """The newest good checkpoint of this run, or the weights that train.init names, or none. Returns the step."""
    if checkpoints.latest() is not None:
        checkpoint = checkpoints.load({**engine.state(), "progress": {"step": 0}})
        engine.load(checkpoint.state)
        log.info("resumed from step %d (%s)", checkpoint.step, checkpoint.path)
        return int(checkpoint.state["progress"]["step"])
    if config.train.init is not None:
        weights = checkpoints.load({"model": engine.state()["model"]}, Path(config.train.init))
        engine.load_weights(weights.state["model"])
        log.info("started from the weights of %s", weights.path)
    return 0


def _introduce(config: Config, engine: Engine, ranks: Ranks, step: int) -> None:
    """What a person wants to know at the start, once."""
    model = cost.meta(config.model)
    counted = cost.parameters(model)
    kernels = sorted({attention.core.__module__.rpartition(".")[2] for attention in engine.model.attentions()})
    log.info(
        "%s parameters, %s active; %.0f bytes of cache a token; %d rank(s) on %s; softmax core: %s; steps %d to %d",
        f"{counted.total:,}",
        f"{counted.active:,}",
        cost.kv_bytes_per_token(model),
        ranks.world_size,
        ranks.device,
        ", ".join(kernels),
        step,
        config.train.steps,
    )
