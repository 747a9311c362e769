"""Which documents are held out: by a hash, so that the choice is the same on every machine and every run."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from data.records import Record, hash64

By = Literal["file", "document"]


@dataclass(frozen=True)
class HeldOut:
    """Records whose hash is at most `threshold` (of 2⁶⁴) are held out; -1 holds out none.

    by: what is hashed, the file's name or the whole document's content, so that its copies stay on one side.
    """

    by: By
    threshold: int

    @staticmethod
    def choose(share: float, by: By, names: Iterable[str]) -> HeldOut:
        """About `share` of the files or documents. By file, both sides get at least one file where there are two."""
        threshold = int(share * 2**64) - 1
        if by == "file" and share > 0:
            least, last_but_one, last = 2**64, -1, -1
            for value in map(_hash, names):
                least = min(least, value)
                last_but_one, last = sorted((last_but_one, last, value))[1:]
            threshold = min(max(threshold, least), last_but_one)
        return HeldOut(by, threshold)

    def split(self, record: Record) -> str:
        """`valid` or `train`."""
        value = _hash(record.file) if self.by == "file" else record.document
        return "valid" if value <= self.threshold else "train"


def _hash(name: str) -> int:
    return hash64(os.fsencode(name))
