"""In which order a source's windows of one length are read: shuffled a block at a time.

An epoch's documents come in an order drawn for it, and windows are cut from their stream: neighbours are often of one
document, and a batch of neighbours says little of the corpus. So the windows of a block, which is an epoch or a part of
it, are permuted again. What is read is known all the same at any place: blocks one after the other.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from data.source import Source, random_bits

BLOCK = 1 << 24
"""Tokens of a block: many documents, and few tokens beside a corpus that takes long to read, since where the length of
the windows changes the rest of a block is left out."""
LEAST = 1024
"""Windows of a block at least, where they are long."""


class Shuffle:
    """A source's windows of one length, from `origin` on. A source without epochs is read as it comes.

    A pure function of its arguments and of the source's fingerprint. block: windows; None: as many as `BLOCK` says.
    """

    def __init__(self, source: Source, sequence_length: int, origin: int, seed: int, block: int | None = None) -> None:
        self._tokens = source.num_tokens
        self._key = source.fingerprint, seed, sequence_length
        self._length, self._origin = sequence_length, origin
        self._block = block or max(BLOCK // sequence_length, LEAST)
        self._permuted = lru_cache(maxsize=2)(self._permute)

    def window(self, n: int) -> int:
        """The index in the source of the n-th window to be read."""
        if self._tokens is None:
            return self._origin + n
        begin, end = self._bounds(n)
        return begin + int(self._permuted(begin, end)[self._origin + n - begin])

    def used(self, taken: int) -> int:
        """Tokens of the source's stream behind which nothing was read, once so many windows were."""
        if taken == 0 or self._tokens is None:
            return (self._origin + taken) * self._length
        return self._bounds(taken - 1)[1] * self._length

    def _bounds(self, n: int) -> tuple[int, int]:
        """The block of the n-th window: its first window, and the one after its last. None reaches across the end of
        an epoch, to which the window belongs that lies across it."""
        assert self._tokens is not None
        at = self._origin + n
        epoch = at * self._length // self._tokens
        first, end = (-(-e * self._tokens // self._length) for e in (epoch, epoch + 1))
        first = max(first, self._origin)
        begin = at - (at - first) % self._block
        return begin, min(begin + self._block, end)

    def _permute(self, begin: int, end: int) -> NDArray[np.int64]:
        return np.argsort(random_bits(end - begin, "windows", *self._key, begin), kind="stable")
