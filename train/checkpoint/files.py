"""Files whose checksums are taken while they are written."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from numpy import uint8
from numpy.typing import NDArray
from torch import Tensor

from models.checkpoint import FileRecord, as_text

# Bytes under one checksum: large, so that the work is done without Python's lock; small, so that threads can share it.
CHUNK = 1 << 24


class HashedFile:
    """A new file, written front to back; `record` is what was meant to be written, not what a disk made of it.

    pace: told after each piece how many seconds it took; it may sleep.
    """

    def __init__(self, path: Path, pace: Callable[[float], object] | None = None) -> None:
        self.record = FileRecord()
        self._pace = pace
        self._crc = 0
        # unbuffered: a buffer is filled under Python's lock, which training waits for
        self._file = path.open("xb", buffering=0)

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                if self.record.size % CHUNK:
                    self.record.checksums.append(as_text(self._crc))
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def write(self, data: bytes | memoryview) -> int:
        """Append all of `data`."""
        rest = memoryview(data).cast("B")
        while len(rest):
            part, rest = rest[: CHUNK - self.record.size % CHUNK], rest[CHUNK - self.record.size % CHUNK :]
            begun = time.perf_counter()
            self._crc = zlib.crc32(part, self._crc)
            written = 0
            while written < len(part):
                written += self._file.write(part[written:])
            self.record.size += len(part)
            if self.record.size % CHUNK == 0:
                self.record.checksums.append(as_text(self._crc))
                self._crc = 0
            if self._pace is not None:
                self._pace(time.perf_counter() - begun)
        return len(data)


def write_hashed(path: Path, content: bytes) -> FileRecord:
    """A whole new file."""
    with HashedFile(path) as file:
        file.write(content)
    return file.record


def as_bytes(tensor: Tensor) -> NDArray[uint8]:
    """The memory of a contiguous tensor on the host."""
    return tensor.view(-1).view(torch.uint8).numpy()


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable: a rename is, only once its folder is synced."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
