"""Saving and loading the state of a run."""

from __future__ import annotations

import io
import logging
import shutil
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from conf.schema import Refused
from models.checkpoint import (
    MANIFEST,
    TABLE,
    Chunk,
    Entry,
    FileRecord,
    Files,
    Manifest,
    Table,
    complete,
    path_of,
    read_table,
    refuse_damage,
)
from parallel.box import box_of, local

from . import folder as folders
from .files import CHUNK, write_hashed
from .peers import Peers, RankFailed
from .plan import Plan, agree, layout
from .priority import yield_to_compute
from .staging import Staging
from .tree import Tree, put_together, take_apart

log = logging.getLogger(__name__)

PLAIN_FILE = "plain.pt"

REST = 6
"""Seconds of rest after each second of writing in the background; `python -m tests.measure_save` shows the effect."""


class SaveFailed(RuntimeError):
    """A checkpoint was not written; one sentence says which, why and on which rank. The one before it stays."""


@dataclass(frozen=True)
class Checkpoint:
    """What was loaded: from where, of which step, with which facts of the run that saved it, and the state."""

    path: Path
    step: int
    facts: Mapping[str, Any]
    state: dict[str, Any]


class Share(NamedTuple):
    """Of a checkpoint's verification: its step and facts, and the chunks that this rank looks at."""

    step: int
    facts: Mapping[str, Any]
    chunks: list[Chunk]


class Checkpoints:
    """The checkpoints of one run, in `folder`, which all ranks see. Every method is called by every rank.

    keep: how many of the newest stay. keep_every: those of steps that it divides stay too; None for none.
    facts: what each checkpoint's manifest tells of the run (rank count, versions); values that JSON has.
    grace: seconds between a launcher's SIGTERM and its SIGKILL; a save that takes longer is told. None: no limit.

    What a killed run left unfinished is removed when this is made. Raises ValueError for a `keep` below 1.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 3,
        keep_every: int | None = None,
        facts: Mapping[str, Any] | None = None,
        grace: float | None = None,
    ) -> None:
        if keep < 1 or (keep_every is not None and keep_every < 1):
            raise ValueError(f"keep is {keep} and keep_every {keep_every}; give 1 or more")
        self.folder = folder
        self.keep = keep
        self.keep_every = keep_every
        self.facts = dict(facts or {})
        self._grace = grace
        self._rested = 0.0
        self._peers = Peers()
        self._plan: Plan | None = None
        self._staging = Staging()
        # what is Python would, at a low priority, keep the lock from training, so only bytes are written slowly
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._bytes = ThreadPoolExecutor(1, "checkpoint-bytes", yield_to_compute, (19,))
        self._hurry = threading.Event()
        self._writing: tuple[int, Future[None]] | None = None
        for name in self._peers.first(lambda: folders.clean(folder)):
            self._log(logging.INFO, "removed %s, which an interrupted run left unfinished", name)

    def reserve(self, state: Tree) -> None:
        """Plan and take the memory that saving `state` needs now, so that the first save is as quick as the others."""
        tensors, _ = take_apart(state)
        self._staging.reserve(_written_here(self._planned(tensors), tensors))

    def save(self, step: int, state: Tree, wait: bool = False) -> None:
        """Copy `state` and write the copy, both in the background, or before returning if `wait`.

        state: mappings of tensors, DTensors and plain values; what is not sharded is rank 0's. No tensor may change
        before `release`. The first save waits until the ranks have agreed on who writes what; every one, for a save
        that is still running. Raises SaveFailed if that one, or with `wait` this one, was not written.
        """
        if self._writing is not None and not self.idle:
            self._log(logging.WARNING, "checkpoint of step %d waits for that of step %d", step, self._writing[0])
        self.wait()
        tensors, plain = take_apart(state)
        try:
            plan = self._planned(tensors)
        except RuntimeError as error:
            raise self._not_written(step, error) from error
        staged = self._staging.begin(_written_here(plan, tensors))
        packed = io.BytesIO()
        torch.save(plain, packed)
        self._log(logging.INFO, "checkpoint of step %d: writing", step)
        self._hurry.clear()
        # not getbuffer(): one that a failed save's traceback keeps crashes the garbage collector of Python 3.12
        self._writing = step, self._thread.submit(self._write, step, plan, staged, packed.getvalue())
        if wait:
            self.wait()

    def release(self) -> None:
        """Let the state that was saved last change from now on. Not collective; quick where nothing is being copied."""
        self._staging.release()

    @property
    def idle(self) -> bool:
        """Whether this rank is writing nothing just now. The one method that is not collective."""
        return self._writing is None or self._writing[1].done()

    def wait(self) -> None:
        """Return once nothing is being written. Raises SaveFailed if it was not written."""
        if self._writing is not None:
            _, future = self._writing
            self._writing = None
            self._hurry.set()
            self.release()  # what is left of the copy is made here, not at a low priority
            future.result()

    def close(self) -> None:
        """Wait, and end the background thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._bytes.shutdown()
            self._staging.close()

    def latest(self) -> Path | None:
        """The newest checkpoint, not verified; None if there is none."""
        self.wait()
        return self._peers.first(lambda: next(iter(complete(self.folder)), None))

    def load(self, state: Tree, path: Path | None = None, optional: str | None = None) -> Checkpoint:
        """Fill the tensors of `state` in place from a verified checkpoint; return it with plain values replaced too.

        path: a checkpoint, or a run's folder for its newest; None for this run's newest good one. Parts that `state`
        does not name at its top level are not read: `{"model": …}` reads the weights alone.
        optional: a part, by its path, that either may be wholly without: then it stays as it is, or is not read.

        A bad checkpoint is named, set aside and the previous one used. Raises Refused, with nothing changed, if none is
        left, if the one at `path` is bad, or if it does not fit `state`.
        """
        self.wait()
        tensors, plain = take_apart(state)
        bad: dict[Path, str] = {}
        for candidate in self._peers.first(lambda: self._candidates(path)):
            found = self._verify(candidate)
            if isinstance(found, Share):
                break
            bad[candidate] = found
        else:
            raise Refused(_refusal(path or self.folder, bad))

        table = read_table(candidate)
        values: dict[str, Any] = torch.load(candidate / PLAIN_FILE, weights_only=True)
        if optional is not None:
            tensors, table = self._without(candidate, tensors, table, f"{optional}.")
        self._check(candidate, tensors, plain, table, values)
        if path is None:
            self._set_aside(bad)
        self._peers.each(lambda: _read(candidate, table, tensors))
        return Checkpoint(candidate, found.step, found.facts, put_together(state, values))

    def _planned(self, tensors: Mapping[str, Tensor]) -> Plan:
        """That of the save before, unless the tensors of any rank lie in another way now."""
        if self._plan is None or self._peers.any(self._plan.layout != layout(tensors)):
            self._plan = agree(self._peers, tensors)
        return self._plan

    def _write(self, step: int, plan: Plan, parts: Mapping[str, Tensor], plain: bytes) -> None:
        path = path_of(self.folder, step)
        partial = folders.aside(path, folders.PARTIAL)
        begun, self._rested = time.monotonic(), 0.0

        def write() -> dict[str, FileRecord]:
            return self._bytes.submit(plan.write, partial, parts, self._rest).result()

        def finish(shares: list[dict[str, FileRecord]]) -> list[int]:
            files = {name: record for share in shares for name, record in share.items()}
            files[TABLE] = write_hashed(partial / TABLE, plan.table.encode())
            files[PLAIN_FILE] = write_hashed(partial / PLAIN_FILE, plain)
            write_hashed(partial / MANIFEST, Manifest(step, self.facts, files, CHUNK).text().encode())
            folders.publish(partial, path)
            return [sum(record.size for record in files.values())] * len(shares)

        try:
            self._staging.arrive()
            self._peers.first(lambda: partial.mkdir())
            size = self._peers.meet(write, finish)
        except Exception as error:
            if self._peers.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)  # what stays all the same, the next start removes
            raise self._not_written(step, error) from error
        seconds = time.monotonic() - begun
        self._log(logging.INFO, "checkpoint of step %d: %.3g GB in %.1f s", step, size / 1e9, seconds)
        self._tell_if_too_long(step, seconds - self._rested)
        if self._peers.rank == 0:
            try:
                folders.prune(self.folder, self.keep, self.keep_every)
            except OSError as error:
                log.warning("an old checkpoint in %s could not be removed: %s", self.folder, error)

    def _not_written(self, step: int, error: Exception) -> SaveFailed:
        reason = str(error) if isinstance(error, RankFailed) else f"lost a rank: {error}".splitlines()[0]
        return SaveFailed(
            f"The checkpoint of step {step} was not written to {self.folder} ({reason}); the one before it"
            " is kept: mend the cause and run the same command again."
        )

    def _candidates(self, path: Path | None) -> list[Path]:
        if path is None:
            return complete(self.folder)
        found = folders.find(path)
        return [found] if found else []

    def _verify(self, path: Path) -> Share | str:
        """The manifest's step and facts, or what is wrong with the checkpoint; the ranks share the reading."""

        def share_out(ranks: list[None]) -> list[Share | str]:
            """Rank 0 looks at every size, and hands out the chunks."""
            try:
                manifest = Manifest.read(path)
                manifest.refuse_other_sizes(path)
            except (ValueError, OSError) as error:
                return [str(error) for _ in ranks]
            chunks = [chunk for file in manifest.files for chunk in manifest.chunks(file)]
            return [Share(manifest.step, manifest.facts, chunks[rank :: len(ranks)]) for rank in range(len(ranks))]

        share = self._peers.meet(lambda: None, share_out)
        if isinstance(share, str):
            return share
        return next(filter(None, self._peers.each(lambda: _problem(path, share.chunks))), share)

    def _without(
        self, path: Path, tensors: dict[str, Tensor], table: Table, part: str
    ) -> tuple[dict[str, Tensor], Table]:
        """What is to be read and what there is, less the part that one of them has not."""
        here = any(self._peers.each(lambda: any(name.startswith(part) for name in tensors)))
        there = any(name.startswith(part) for name in table)
        if here and not there:
            self._log(logging.INFO, "%s has no %s*, which starts as it was initialised", path, part)
            return {name: tensor for name, tensor in tensors.items() if not name.startswith(part)}, table
        if there and not here:
            self._log(logging.INFO, "%s has %s*, which this model is without and leaves out", path, part)
            return tensors, {name: entry for name, entry in table.items() if not name.startswith(part)}
        return tensors, table

    def _check(
        self,
        path: Path,
        tensors: Mapping[str, Tensor],
        plain: Mapping[str, Any],
        table: Table,
        values: Mapping[str, Any],
    ) -> None:
        """Raise Refused on every rank if any finds that checkpoint and state differ in a name, a shape or a dtype."""
        wanted = {name for names in self._peers.each(lambda: [*tensors, *plain]) for name in names}
        parts = {name.partition(".")[0] for name in wanted}
        unexpected = [name for name in [*table, *values] if name not in wanted and name.partition(".")[0] in parts]
        differences = [
            *(_difference(name, table.get(name), tensor) for name, tensor in tensors.items()),
            *(f"it has no {name}" for name in plain if name not in values),
            *(f"it has {name} {_shape(table.get(name))}, which is unknown here" for name in unexpected),
        ]
        found = self._peers.each(lambda: next(filter(None, differences), None))
        if difference := next(filter(None, found), None):
            raise Refused(
                f"checkpoint {path} does not fit this run: {difference}; give the configuration that it was saved with,"
                " or another checkpoint."
            )

    def _rest(self, seconds: float) -> None:
        """After so much work, leave the machine to training for `REST` times as long, unless somebody waits."""
        begun = time.monotonic()
        self._hurry.wait(REST * seconds)
        self._rested += time.monotonic() - begun

    def _tell_if_too_long(self, step: int, seconds: float) -> None:
        if self._grace is not None and seconds > self._grace:
            self._log(
                logging.WARNING,
                "writing the checkpoint of step %d took %.0f s without its rests, but the launcher kills a process "
                "%.0f s after SIGTERM, so a save asked for that way would be lost: ask with a `stop` file, "
                "or start torchrun with TORCH_ELASTIC_SHUTDOWN_TIMEOUT=%.0f.",
                step,
                seconds,
                self._grace,
                3 * seconds,
            )
            self._grace = None  # once is enough

    def _set_aside(self, bad: Mapping[Path, str]) -> None:
        for path, reason in bad.items():
            renamed = self._peers.first(lambda path=path: folders.set_aside(path))  # type: ignore[misc]
            self._log(logging.WARNING, "checkpoint %s is bad: %s; set aside as %s", path, reason, renamed.name)

    def _log(self, level: int, message: str, *values: object) -> None:
        if self._peers.rank == 0:
            log.log(level, message, *values)


def _written_here(plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: local(tensors[name]).detach() for name in plan.mine}


def _problem(path: Path, chunks: list[Chunk]) -> str | None:
    try:
        refuse_damage(path, chunks)
    except ValueError as error:
        return str(error)
    return None


def _read(path: Path, table: Table, tensors: Mapping[str, Tensor]) -> None:
    """Fill this rank's part of each of `tensors` in place."""
    files = Files(path)
    for name, tensor in tensors.items():
        begin, local = box_of(tensor)
        files.fill(local, begin, table[name])


def _difference(name: str, entry: Entry | None, tensor: Tensor) -> str | None:
    here = f"{_shape(tensor)} of {tensor.dtype}"
    if entry is None:
        return f"it has no {name}, which is {here} here"
    there = f"{_shape(entry)} of {entry.dtype}"
    return None if there == here else f"{name} is {there} there but {here} here"


def _shape(entry: Entry | Tensor | None) -> str:
    return "" if entry is None else str(list(entry.shape))


def _refusal(where: Path, bad: Mapping[Path, str]) -> str:
    if not bad:
        return (
            f"there is no checkpoint at {where}; name a run that has saved one, a checkpoint, or a directory of "
            "weights with its model.yaml or config.json."
        )
    reasons = "; ".join(f"{path} is bad: {reason}" for path, reason in bad.items())
    return f"no good checkpoint is left at {where} ({reasons}); give another one, or move these away to start anew."
