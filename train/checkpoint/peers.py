"""The ranks that save and load together: what one finds, all know."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

T = TypeVar("T")

# A rank that writes a large part to a slow disk keeps the others waiting; one that died is noticed at once.
PATIENCE = timedelta(hours=2)


class SaveFailed(RuntimeError):
    """A checkpoint was not written; one sentence says which, why and on which rank. The one before it stays."""


class Peers:
    """A gloo group of all ranks, of its own: a background thread's collectives never mix with the training's."""

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    def each(self, value: T) -> list[T]:
        """Every rank's value, in rank order."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def first(self, action: Callable[[], T]) -> T:
        """What `action` returns on rank 0, where alone it runs; raises on every rank if it raised there."""
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = action()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self.group)
        value, failure = outcome
        if failure is not None:
            raise failure
        return value


def cause(error: BaseException) -> str:
    """The reason behind an error of several ranks, in one line: the first failing rank's own."""
    if isinstance(error, CheckpointException):
        rank, (error, _) = min(error.failures.items(), key=lambda failure: failure[0])
        return f"rank {rank}: {cause(error)}"
    return f"{type(error).__name__}: {error}".splitlines()[0]
