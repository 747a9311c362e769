"""The training loop, as prose: a batch, a step, and what happens once in a while, each beside its cadence."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from data.batch import Batch
from data.config import Probe, Probes, headline
from data.course import Course
from data.loader import Loader
from train import meter, rundir, statistics
from train.checkpoint import Checkpoints
from train.config import Config
from train.engines.torch import Engine, Step
from train.metrics import Metrics
from train.phases import Stretch, stretches
from train.profiler import Profiler
from train.ranks import Ranks
from train.statistics import Watch
from train.stop import StopRequest

log = logging.getLogger(__name__)


class Diverged(Exception):
    """A loss, gradient or state that is not finite: one sentence with the step and the batch."""


@dataclass
class Progress:
    """How far a run is. step: updates made. owes_validation: it was stopped before the validation due at that step.

    data: where its data stood when it was saved, as `data.course.Standing` says it.
    """

    step: int = 0
    owes_validation: bool = False
    data: dict[str, Any] | None = None

    def is_over(self, steps: int) -> bool:
        """Whether a run of so many steps has nothing left to do."""
        return self.step == steps and not self.owes_validation


@dataclass
class Run:
    """Everything a run holds while it trains."""

    directory: Path
    config: Config
    ranks: Ranks
    engine: Engine
    course: Course
    probes: Probes
    checkpoints: Checkpoints
    stop: StopRequest
    metrics: Metrics | None
    learning_rate: float
    profiler: Profiler
    progress: Progress = field(default_factory=Progress)
    flops_per_token: dict[int, float] = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        """All that resuming needs."""
        return {**self.engine.state(), "progress": asdict(self.progress)}

    @property
    def step(self) -> int:
        return self.progress.step


def train(run: Run) -> str | None:
    """Run to the last step (None), or until asked to stop, and saved (by whom). Raises Diverged, SaveFailed."""
    config, total = run.config, run.config.train.steps
    pending: Pending | None = None
    for stretch in stretches(config.train, run.learning_rate):
        run.engine.set_mode(stretch.attention)
        run.engine.mtp_weight = stretch.mtp_weight
        run.flops_per_token.clear()
        if run.progress.owes_validation and run.step <= stretch.stop:
            if not validate(run, stretch):
                return run.ranks.any_of(run.stop.obey())  # there is nothing new to save: the checkpoint owes it still
            run.progress.owes_validation = False
        if run.step >= stretch.stop:
            continue
        with _loader(run, stretch).stream(stretch.consumed(run.step), stretch.rows) as batches:
            while run.step < stretch.stop:
                run.profiler.before(run.step + 1)
                clock = meter.Clock(run.ranks.device)
                batch = next(batches)
                clock.mark("data")
                rate = stretch.learning_rate * config.schedule.rate(run.step, total)
                watching = config.log.statistics and (run.step + 1) % config.log.statistics == 0
                watch = run.engine.watch() if watching else None
                result = run.engine.step(batch, rate, clock, watch)
                run.progress.step += 1
                run.profiler.after(run.step)

                # the step before is read now that this one is under way, so that the device never waits for the host
                if pending is not None:
                    pending.finish(run)
                asked, digest = run.ranks.total(run.stop.asked(), int(batch.digest, 16))
                numbers = meter.OnHost((result, watch.table if watch is not None else None))
                pending = Pending(run.step, stretch, f"{digest:016x}", rate, numbers, clock, watch)

                stopping = asked > 0
                saving = stopping or run.step % config.checkpoint.every == 0 or run.step == total
                validating = run.step == total or (config.evaluate.every and run.step % config.evaluate.every == 0)
                if saving or validating:
                    pending.finish(run)
                    pending = None
                # before the save: once a step is saved, its lines are written. Who asks to stop may not wait for long
                run.progress.owes_validation = bool(validating and stopping and run.step < total)
                if validating and not run.progress.owes_validation:
                    if not validate(run, stretch):
                        run.progress.owes_validation = stopping = saving = True
                    clock.mark("validate")
                if stopping and run.ranks.first:  # what is left to read where the launcher does not wait for the save
                    cut = f"killed while saving step {run.step}: the same command resumes from the checkpoint before"
                    rundir.write_exit(run.directory, rundir.FAILED, cut)
                if saving:
                    run.progress.data = run.course.standing(stretch.consumed(run.step)).plain()
                    save(run, clock, wait=stopping or run.step == total)
                if stopping:
                    reason = run.ranks.any_of(run.stop.obey())
                    if run.step < total or run.progress.owes_validation:
                        return reason
    return None


@dataclass
class Pending:
    """A step whose numbers, and the table of its watch, are still on their way from the device.

    batch: digest of the global batch.
    """

    step: int
    stretch: Stretch
    batch: str
    rate: float
    numbers: meter.OnHost[tuple[Step, Tensor | None]]
    clock: meter.Clock
    watch: Watch | None

    def finish(self, run: Run) -> None:
        """Read the numbers and write them down. Raises Diverged where they are not finite."""
        result, table = self.numbers.read()
        loss, norm = float(result.loss), float(result.grad_norm)
        batch_tokens = self.stretch.rows * self.stretch.sequence_length
        seconds = self.clock.seconds()
        record: dict[str, Any] = {
            "step": self.step,
            "tokens": self.stretch.tokens_at(self.step),
            "loss": loss,
            "lr": self.rate,
            "grad_norm": norm,
            "batch_tokens": batch_tokens,
            "tokens_per_second": batch_tokens / max(sum(seconds.values()), 1e-9),
            "extra": float(result.extra),
            "batch": self.batch,
            **_sources(run, self.stretch.consumed(self.step)),
            **{f"seconds_{name}": value for name, value in seconds.items()},
            "peak_memory": meter.peak_memory(run.ranks.device),
        }
        peak = meter.peak_flops(run.ranks.device)
        if peak is not None and run.config.train.approximate is None:  # which does less than the model is counted for
            length = self.stretch.sequence_length
            if length not in run.flops_per_token:
                run.flops_per_token[length] = meter.training_flops_per_token(run.engine.model, length)
            of_rank = record["tokens_per_second"] / run.ranks.world_size
            record["mfu"] = of_rank * run.flops_per_token[length] / peak
        if result.loads:
            record["load"] = [float(load.max() / load.double().mean()) for load in result.loads.values()]
        if result.lessons is not None:
            record["kl"], record["recall"] = result.lessons.T.tolist()
        if result.mtp_loss is not None:
            record["mtp_loss"] = result.mtp_loss.tolist()
        if run.metrics is not None:
            run.metrics.write(record)
            run.metrics.progress(record)
            if self.watch is not None and table is not None:
                statistics.write(run.directory, self.watch.line(self.step, table, result.loads))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            first = self.stretch.consumed(self.step - 1)
            raise Diverged(
                f"the loss ({loss}) or the gradient norm ({norm}) is not finite at step {self.step}, "
                f"samples {first} to {first + self.stretch.rows - 1}, batch {self.batch}; "
                "the last checkpoint is from before it."
            )


def save(run: Run, clock: meter.Clock, *, wait: bool) -> None:
    """Checkpoint this step; waits for nothing, unless told to: the next update waits for the copy. Raises Diverged."""
    if not run.engine.is_finite():
        raise Diverged(
            f"the update of step {run.step} left weights or optimizer state that are not finite, so it is not saved; "
            "the last checkpoint is from before it."
        )
    run.checkpoints.save(run.step, run.state(), wait=wait)
    clock.mark("save")
    if run.metrics is not None:
        run.metrics.write({"step": run.step, "seconds_save": clock.seconds()["save"]})


class _Asked(Exception):
    """To stop, in the middle of a validation, whose numbers are dropped: a launcher may not wait for its end."""


def validate(run: Run, stretch: Stretch) -> bool:
    """Held-out loss on the same windows each time, of every source. Returns False, and writes nothing, where the run
    was asked to stop meanwhile.

    `val_loss`, `val_accuracy`, `val_bpb` and `val_position` are of the first source named that holds text, or of the
    first where none does; `val_sources` has them all.
    """
    if not run.probes:
        return True
    try:
        measured = {name: _measure(run, stretch, probe) for name, probe in run.probes.items()}
    except _Asked:
        return False
    first, position = measured[headline(run.probes)]
    record: dict[str, Any] = {"step": run.step}
    record |= {f"val_{key}": first[key] for key in ("loss", "accuracy", "bpb") if key in first}
    lines = {name: line for name, (line, _) in measured.items()}
    if run.metrics is not None:
        run.metrics.write({**record, "val_sources": lines, "val_position": position})
    for name, line in lines.items():
        of = f" {name}" if len(measured) > 1 else ""
        numbers = "  ".join(f"{key} {line[key]:.4f}" for key in ("loss", "accuracy", "bpb") if key in line)
        log.info("step %d  validation%s  %s", run.step, of, numbers)
    return True


def _unless_asked(run: Run, batches: Iterator[Batch]) -> Iterator[Batch]:
    """The batches, as long as no rank was asked to stop. Raises _Asked, on every rank at the same batch."""
    for batch in batches:
        if run.ranks.total(run.stop.asked())[0]:
            raise _Asked
        yield batch


def _measure(run: Run, stretch: Stretch, probe: Probe) -> tuple[dict[str, Any], dict[str, Any]]:
    """Loss, accuracy, scored tokens, bits per byte where there is text, what the source says of itself; and the loss by
    position."""
    length = probe.length or stretch.sequence_length
    loader = Loader(
        probe.source,
        sequence_length=length,
        seed=0,
        rank=run.ranks.rank,
        world_size=run.ranks.world_size,
    )
    # as many tokens in a forward as in training, so that a longer window needs no more memory
    rows = max(1, run.config.train.micro_batch * stretch.sequence_length // length) * run.ranks.world_size
    batches = _unless_asked(run, loader.fixed(run.config.evaluate.samples, rows))
    result = run.engine.evaluate(batches)
    line: dict[str, Any] = {"loss": result.loss, "accuracy": result.accuracy, "tokens": result.tokens}
    if probe.source.bytes_per_token is not None:
        line["bpb"] = result.loss / math.log(2) / probe.source.bytes_per_token
    position = {"edges": result.edges, "loss": result.loss_by_position}
    return {**line, "facts": dict(probe.facts(length))}, position


def _sources(run: Run, num_samples: int) -> dict[str, Any]:
    """Windows of each source that the first samples held, where there are several."""
    return {"sources": run.course.consumed(num_samples)} if len(run.course.names) > 1 else {}


def _loader(run: Run, stretch: Stretch) -> Loader:
    return Loader(
        run.course,
        sequence_length=stretch.sequence_length,
        depth=run.engine.model.mtp_depth,
        seed=run.config.data.seed,
        rank=run.ranks.rank,
        world_size=run.ranks.world_size,
        first=stretch.consumed(run.step),
    )
