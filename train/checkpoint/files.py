"""Files whose checksums are taken while they are written, the manifest that lists them, and their verification."""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from numpy import uint8
from numpy.typing import NDArray
from torch import Tensor

# Bytes under one checksum: large, so that the work is done without Python's lock; small, so that threads can share it.
CHUNK = 1 << 24
VERIFY_THREADS = 4

MANIFEST = "manifest.json"


@dataclass
class FileRecord:
    """A file's size in bytes and the CRC-32 of each `CHUNK` of it."""

    size: int = 0
    checksums: list[str] = field(default_factory=list)


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
                    self.record.checksums.append(_text(self._crc))
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
                self.record.checksums.append(_text(self._crc))
                self._crc = 0
            if self._pace is not None:
                self._pace(time.perf_counter() - begun)
        return len(data)


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is: its step, the facts that its run states (layout, versions), its files."""

    step: int
    facts: Mapping[str, Any]
    files: Mapping[str, FileRecord]
    chunk: int = CHUNK

    def write(self, folder: Path) -> None:
        """The last file of a checkpoint."""
        body = {
            "step": self.step,
            "facts": dict(self.facts),
            "chunk": self.chunk,
            "files": {name: {"size": r.size, "checksums": r.checksums} for name, r in sorted(self.files.items())},
        }
        text = json.dumps({"checksum": _text(zlib.crc32(_canonical(body))), **body}, indent=1)
        with HashedFile(folder / MANIFEST) as file:
            file.write(text.encode())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises ValueError in one phrase when the manifest is missing or not what was written."""
        try:
            body = json.loads((folder / MANIFEST).read_bytes())
            stated = body.pop("checksum")
            whole = stated == _text(zlib.crc32(_canonical(body)))
            files = {name: FileRecord(**record) for name, record in body["files"].items()}
        except FileNotFoundError:
            raise ValueError(f"{MANIFEST} is missing") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            whole = False
        if not whole:
            raise ValueError(f"{MANIFEST} is damaged")
        return cls(body["step"], body["facts"], files, body["chunk"])

    def problem(self, folder: Path, share: int = 0, num_shares: int = 1) -> str | None:
        """What is wrong with the files in `folder`, in one phrase; None if nothing.

        The shares 0 … num_shares - 1 together look at every chunk once, and each looks at every size.
        """
        for name, record in self.files.items():
            try:
                size = (folder / name).stat().st_size
            except OSError as error:
                return f"{name} cannot be read ({error.strerror})"
            if size != record.size:
                return f"{name} has {size} bytes instead of {record.size}"
        chunks = [
            (name, place * self.chunk, stated)
            for name, record in self.files.items()
            for place, stated in enumerate(record.checksums)
        ]
        with ThreadPoolExecutor(VERIFY_THREADS) as threads:
            found = threads.map(lambda chunk: self._chunk_problem(folder, *chunk), chunks[share::num_shares])
            return next(filter(None, found), None)

    def _chunk_problem(self, folder: Path, name: str, begin: int, stated: str) -> str | None:
        try:
            with (folder / name).open("rb", buffering=0) as file:
                file.seek(begin)
                crc, left = 0, self.chunk
                while left and (data := file.read(min(left, 1 << 20))):
                    crc, left = zlib.crc32(data, crc), left - len(data)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if _text(crc) != stated:
            return f"{name} is damaged between bytes {begin} and {begin + self.chunk}"
        return None


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


def _canonical(body: object) -> bytes:
    return json.dumps(body, sort_keys=True).encode()


def _text(crc: int) -> str:
    return f"{crc:08x}"
