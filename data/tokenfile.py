"""Megatron's .bin and .idx, written part by part.

The bytes are those of megatron-core's `IndexedDatasetBuilder`, a sequence being a document. Its memory grows by some
hundred bytes a document and its import takes seconds; here the lengths wait in a file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
TYPE_CODES: dict[type, int] = {np.int32: 4, np.uint16: 8}
BLOCK = 1 << 15  # lengths in memory


class TokenFile:
    """`prefix`.bin and `prefix`.idx in the making, of tokens of type `kind`."""

    def __init__(self, prefix: Path, kind: type[np.uint16] | type[np.int32]) -> None:
        self._kind = kind
        self._idx = prefix.with_name(f"{prefix.name}.idx")
        self._lengths = prefix.with_name(f"{prefix.name}.lengths")
        self._bin_file = prefix.with_name(f"{prefix.name}.bin").open("wb")
        self._lengths_file = self._lengths.open("wb")
        self.documents = 0

    def add_tokens(self, tokens: NDArray[Any]) -> None:
        """Those of documents, joined."""
        self._bin_file.write(tokens.astype(self._kind, copy=False).data)

    def add_lengths(self, lengths: NDArray[np.int32]) -> None:
        """How many tokens each document has."""
        self._lengths_file.write(lengths.astype(np.int32, copy=False).data)
        self.documents += len(lengths)

    def close(self) -> None:
        """Write the index."""
        self._bin_file.close()
        self._lengths_file.close()
        with self._idx.open("wb") as file:
            file.write(
                MAGIC + struct.pack("<QBQQ", VERSION, TYPE_CODES[self._kind], self.documents, self.documents + 1)
            )
            for lengths in self._blocks():
                file.write(lengths.data)
            begin = 0
            for lengths in self._blocks():
                ends = begin + np.cumsum(lengths, dtype=np.int64) * np.dtype(self._kind).itemsize
                file.write(np.concatenate([[begin], ends[:-1]]).astype(np.int64).data)
                begin = int(ends[-1])
            for first in range(0, self.documents + 1, BLOCK):
                file.write(np.arange(first, min(first + BLOCK, self.documents + 1), dtype=np.int64).data)
        self._lengths.unlink()

    def _blocks(self) -> Iterator[NDArray[np.int32]]:
        with self._lengths.open("rb") as file:
            while block := file.read(4 * BLOCK):
                yield np.frombuffer(block, np.int32)
