"""What a corpus or a synthetic task must answer: windows, each a pure function of its index and a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Facts = Mapping[str, str | int | float | bool | None]


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of packed documents.

    tokens: [L] of any integer type, ids below the source's `vocab`.
    starts: [P] int64, increasing offsets in the window at which a document piece begins; the first is 0.
    scored: [L] bool, the tokens that count as targets; None where all do.
    """

    tokens: NDArray[np.integer]
    starts: NDArray[np.int64]
    scored: NDArray[np.bool_] | None = None


class Windows(Protocol):
    """An endless, indexed supply of windows.

    vocab:      every id is below it.
    num_tokens: tokens of one epoch, each an input exactly once; None where there are no epochs (synthetic tasks).
    """

    @property
    def vocab(self) -> int: ...
    @property
    def num_tokens(self) -> int | None: ...

    def window(self, index: int, sequence_length: int, lookahead: int, seed: int) -> Window:
        """Window `index` of the order drawn by `seed`: `sequence_length` inputs and the `lookahead` tokens after them.

        A pure function. Raises Refused where there is no window of that length.
        """
        ...


class Source(Windows, Protocol):
    """A corpus or a synthetic task.

    fingerprint:     names the content: equal fingerprints give equal windows.
    tokenizer:       names what made its ids of text, which then mean the same in all sources; None where there is none.
    bytes_per_token: bytes of text that a token stands for, which turns nats per token into bits per byte; None where
                     there is no text.
    unigram_entropy: nats per scored token of a predictor that knows only how frequent each token is.
    facts:           what a synthetic task says of itself: `task`, `null` (whether the answers cannot be known),
                     `chance` (share of scored tokens that a guess gets right), and what makes it hard. Of text,
                     nothing.
    """

    @property
    def fingerprint(self) -> str: ...
    @property
    def tokenizer(self) -> str | None: ...
    @property
    def bytes_per_token(self) -> float | None: ...
    @property
    def unigram_entropy(self) -> float: ...
    @property
    def facts(self) -> Facts: ...


class SourceConfig(Protocol):
    """A source's settings: the dataclass `Config` of its module."""

    def open(self) -> Source:
        """The source itself. Raises Refused where it cannot be read whole."""
        ...


def random_bits(count: int, *key: object) -> NDArray[np.uint64]:
    """`count` uniform 64-bit numbers that depend on `key` alone.

    Raw Philox output: NumPy promises it for ever, unlike its shuffles and distributions.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    generator = np.random.Philox(key=int.from_bytes(digest, "little"))
    return generator.random_raw(count)
