"""Neighbouring tokens of a document, found by where they stand (NSA, arXiv 2502.11089, equation 12).

What is read is a few ranges of positions: chosen blocks, the first tokens. Where the entries of these tokens lie among
all that are read is looked up by document and position, so that no layout of the entries is taken for granted: rows,
shards in any order, a cache from which entries were dropped.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from models.contract import NOTHING, Entries, Sequence
from models.selection.top import NOWHERE

DOCUMENT = 2**32
"""More than any position: document · DOCUMENT + position orders entries by document, then by position."""


class Ranges(NamedTuple):
    """For each query the entries of its ranges, as `cores.gathered` reads them.

    order: [B, T], places of the entries in order of document and position. start, stop: [B, S, K, n] into `order`.
    length: of the longest range.
    """

    order: Tensor
    start: Tensor
    stop: Tensor
    length: int

    @property
    def size(self) -> int:
        return self.start.shape[3] * self.length

    def rows(self, start: int, stop: int) -> Ranges:
        return self._replace(start=self.start[:, start:stop], stop=self.stop[:, start:stop])

    def places(self) -> Tensor:
        ranks = self.start[..., None] + torch.arange(self.length, device=self.start.device)
        there = ranks < self.stop[..., None]
        flat = ranks.clamp_max(self.order.shape[1] - 1).flatten(1)
        places = self.order.gather(1, flat).view_as(ranks)
        return torch.where(there, places, NOWHERE).flatten(3)


def find(entries: Entries, first: Tensor, length: int, sequence: Sequence, beyond: int = 0) -> Ranges:
    """Ranges of `length` positions of the query's document from `first` [B, S, K, n] on (none where NOWHERE), up to
    `beyond` tokens before the query. entries: of single tokens, at least one."""
    first = first.long()
    rank = entries.document.long() * DOCUMENT + entries.position
    rank, order = torch.where(entries.document == NOTHING, torch.iinfo(torch.int64).max, rank).sort(1)
    last = (first + length - 1).minimum((sequence.position - beyond)[:, :, None, None])
    last = torch.where(first == NOWHERE, NOWHERE, last)
    base = (sequence.document.long() * DOCUMENT)[:, :, None, None]

    def ranked(position: Tensor, *, right: bool) -> Tensor:
        return torch.searchsorted(rank, (base + position).flatten(1), right=right).view_as(first)

    return Ranges(order, ranked(first.clamp_min(0), right=False), ranked(last, right=True), length)
