"""Context parallelism without ranks: the shards of a sequence, in lockstep in threads of one process.

A `Shard` is all that a scheme sees of it. Shards exchange through a list, so autograd runs through every exchange.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from models.contract import NOTHING, Entries, Pieces, Sequence, Slot, State
from models.sequence import Whole

Form = Literal["gathered", "within reach", "pieces"]
"""How the entries of other shards come: all in one piece, only those that the own queries may reach, or one by one."""


class Meeting:
    """Where `num_shards` threads hand each other a value at each step."""

    def __init__(self, num_shards: int) -> None:
        self.board: list[Any] = [None] * num_shards
        self.barrier = threading.Barrier(num_shards, timeout=300)

    def exchange(self, index: int, value: Any) -> list[Any]:
        """What every shard gave, in order."""
        self.board[index] = value
        self.barrier.wait()
        values = list(self.board)
        self.barrier.wait()
        return values


class Shard:
    """Tokens start..stop of `whole`, which other shards hold before and after."""

    documents: int | None = None

    def __init__(self, whole: Whole, start: int, stop: int, index: int, meeting: Meeting, form: Form) -> None:
        self.position, self.document = whole.position[:, start:stop], whole.document[:, start:stop]
        self.counts = whole.counts
        self.readers = whole.readers
        self.prepared: dict[int | None, Any] = {}
        self.index, self.meeting, self.form = index, meeting, form

    def at(self, layer: int) -> Sequence:
        return self

    def before(self, slot: Slot, rows: Tensor) -> tuple[Tensor, Tensor]:
        earlier = self.meeting.exchange(self.index, (rows, self.document))[: self.index]
        nothing = rows.new_zeros(rows.shape[0], slot.rows, *rows.shape[2:])
        nowhere = torch.full(nothing.shape[:2], NOTHING)
        past = torch.cat([nothing, *(part for part, _ in earlier)], 1)
        document = torch.cat([nowhere, *(part for _, part in earlier)], 1)
        last = slice(past.shape[1] - slot.rows, None)
        present = (document[:, last] != NOTHING) & (document[:, last] == self.document[:, :1])
        # what is not present must not be used: it is loud
        return past[:, last].masked_fill(~present.view(*present.shape, *[1] * (rows.dim() - 2)), LOUD), present

    def collect(self, slots: tuple[Slot, ...], state: State) -> Pieces:
        given = self.meeting.exchange(self.index, state)
        reaches = {slot.name: slot.reach for slot in slots}
        return {name: self._pieces([other[name] for other in given], reaches[name]) for name in state}

    def total(self, value: Tensor, axis: Literal["sequence", "heads"]) -> Tensor:
        if axis == "heads":  # every shard has them all
            return value.detach()
        return torch.stack(self.meeting.exchange(self.index, value.detach())).sum(0)

    def _pieces(self, parts: list[Entries], reach: int | None) -> list[Entries]:
        if self.form == "pieces":
            own = parts.pop(self.index)
            return [own, *(Entries(part.parts, part.position, part.document) for part in parts)]
        if self.form == "within reach":
            parts = [self._reachable(part, reach) for part in parts[: self.index]] + [parts[self.index]]
        joined = parts[0]
        for part in parts[1:]:
            joined = joined.concatenate(part)
        return [Entries(joined.parts, joined.position, joined.document)]

    def _reachable(self, part: Entries, reach: int | None) -> Entries:
        """The places of an earlier shard that the first query in hand may still read, in any row."""
        near = (part.document == self.document[:, :1]) & (part.document != NOTHING)
        if reach is not None:
            near &= self.position[:, :1] - part.position < reach
        places = near.any(0).nonzero().squeeze(1)
        return Entries(
            {k: v[:, places] for k, v in part.parts.items()}, part.position[:, places], part.document[:, places]
        )


LOUD = 1e3
"""Stands in rows that are not present. Not NaN: a softmax weight of 0 would not silence it."""


def in_shards(whole: Whole, cuts: list[int], form: Form, run: Callable[[Sequence, slice], Any]) -> list[Any]:
    """`run(shard, its tokens)` for each shard, all at once in threads. cuts: where the shards after the first begin."""
    borders = [0, *cuts, whole.position.shape[1]]
    meeting = Meeting(len(borders) - 1)
    results: list[Any] = [None] * meeting.barrier.parties
    errors: list[BaseException] = []

    def work(index: int, start: int, stop: int) -> None:
        try:
            results[index] = run(Shard(whole, start, stop, index, meeting, form), slice(start, stop))
        except threading.BrokenBarrierError as error:
            errors.append(error)
        except BaseException as error:
            errors.insert(0, error)
            meeting.barrier.abort()

    spans = enumerate(pairwise(borders))
    threads = [threading.Thread(target=work, args=(index, start, stop)) for index, (start, stop) in spans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
