"""Which documents are held out: by a hash of a name, so that the choice is the same on every machine and every run."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import Literal

By = Literal["file", "document"]


@dataclass(frozen=True)
class HeldOut:
    """Documents whose hash is at most `threshold` (of 2⁶⁴) are held out; -1 holds out none.

    by: what is hashed, the file's name or that and the document's place in it.
    """

    by: By
    threshold: int

    @staticmethod
    def choose(share: float, by: By, names: list[str]) -> HeldOut:
        """About `share` of the files or documents. By file, both sides get at least one file where there are two."""
        threshold = int(share * 2**64) - 1
        if by == "file" and share > 0:
            hashes = sorted(_hash(name) for name in names)
            threshold = min(max(threshold, hashes[0]), hashes[-2]) if len(hashes) > 1 else -1
        return HeldOut(by, threshold)

    def split(self, name: str, offset: int) -> str:
        """`valid` or `train` for the document at `offset` of the file `name`."""
        key = name if self.by == "file" else f"{name}\0{offset}"
        return "valid" if _hash(key) <= self.threshold else "train"


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(os.fsencode(key), digest_size=8).digest(), "big")
