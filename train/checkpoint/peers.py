"""The ranks that save and load together: what one finds, all know."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.distributed as dist

A = TypeVar("A")
B = TypeVar("B")

# A rank that writes a large part to a slow disk keeps the others waiting; one that died is noticed at once.
PATIENCE = timedelta(hours=2)


class RankFailed(RuntimeError):
    """What a rank had to do failed there; raised on every rank. Says which rank and why, in one line."""


class Outcome(NamedTuple, Generic[A]):
    """What an attempt returned, or why it failed."""

    value: A | None
    failure: str | None


class Peers:
    """A gloo group of all ranks, of its own: collectives pair up in the order in which a rank calls them, and where a
    background thread's fall among the training's differs from rank to rank."""

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    def meet(self, action: Callable[[], A], combine: Callable[[list[A]], list[B]]) -> B:
        """Each rank does `action`; rank 0 does `combine` with what all returned; each rank gets its item of that.

        Raises RankFailed on every rank if any of it failed on any.
        """
        mine = self._attempt(action)
        theirs: list[Any] = [None] * self.size
        dist.gather_object(mine, theirs if self.rank == 0 else None, dst=0, group=self.group)
        answers: list[Outcome[B]] = []
        if self.rank == 0:
            failures: list[Outcome[list[B]]] = [Outcome(None, o.failure) for o in theirs if o.failure is not None]
            combined = failures[0] if failures else self._attempt(lambda: combine([o.value for o in theirs]))
            if combined.value is None:
                answers = [Outcome(None, combined.failure)] * self.size
            else:
                answers = [Outcome(item, None) for item in combined.value]
        answer: list[Any] = [None]
        dist.scatter_object_list(answer, answers, src=0, group=self.group)
        value, failure = answer[0]
        if failure is not None:
            raise RankFailed(failure)
        return value

    def first(self, action: Callable[[], A]) -> A:
        """What `action` returns on rank 0, where alone it runs. Raises RankFailed."""
        return self.meet(lambda: None, lambda _: [action()] * self.size)

    def each(self, action: Callable[[], A]) -> list[A]:
        """What `action` returns on every rank, in rank order. Raises RankFailed."""
        return self.meet(action, lambda values: [values] * self.size)

    def any(self, mine: bool) -> bool:
        """Whether it is so on any rank. Collective; quick."""
        found = torch.tensor(int(mine))
        dist.all_reduce(found, dist.ReduceOp.MAX, self.group)
        return bool(found)

    def _attempt(self, action: Callable[[], A]) -> Outcome[A]:
        try:
            return Outcome(action(), None)
        except Exception as error:
            line = f"{type(error).__name__}: {error}".splitlines()[0]
            return Outcome(None, f"rank {self.rank}: {line}")
