"""A run's checkpoint as it lies on disk, manifest.json, tensors.json and raw files: what it holds, and if it is whole.

train/checkpoint writes it. Layout-independent: a tensor lies there in the boxes that the ranks wrote, and any box of it
is put together from these. Nothing is unpickled.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from conf.schema import Refused, fault

MANIFEST, TABLE = "manifest.json", "tensors.json"
VERIFY_THREADS = 4
_PREFIX = "model."


def path_of(folder: Path, step: int) -> Path:
    """Where among a run's checkpoints that of a step is, once it is complete."""
    return folder / f"step_{step:08d}"


def step_of(path: Path) -> int:
    """The step that a checkpoint's name tells."""
    return int(path.name.removeprefix("step_"))


def complete(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    if not folder.is_dir():
        return []
    return sorted(filter(is_complete, folder.iterdir()), key=step_of, reverse=True)


def is_complete(path: Path) -> bool:
    """By its name, which it gets last."""
    return re.fullmatch(r"step_\d{8,}", path.name) is not None and path.is_dir()


@dataclass
class FileRecord:
    """A file's size in bytes and the checksum of each of its chunks."""

    size: int = 0
    checksums: list[str] = field(default_factory=list)


class Chunk(NamedTuple):
    """Bytes of a file, from `begin` on, under one checksum."""

    file: str
    begin: int
    size: int
    checksum: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is: its step, the facts that its run states (layout, versions), its files, bytes in a chunk."""

    step: int
    facts: Mapping[str, Any]
    files: Mapping[str, FileRecord]
    chunk: int

    def text(self) -> str:
        """What is written; it says its own checksum."""
        body = {
            "step": self.step,
            "facts": dict(self.facts),
            "chunk": self.chunk,
            "files": {name: {"size": r.size, "checksums": r.checksums} for name, r in sorted(self.files.items())},
        }
        return json.dumps({"checksum": as_text(zlib.crc32(_canonical(body))), **body}, indent=1)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises ValueError in one phrase when the manifest is missing or not what was written."""
        try:
            body = json.loads((folder / MANIFEST).read_bytes())
            stated = body.pop("checksum")
            whole = stated == as_text(zlib.crc32(_canonical(body)))
            files = {name: FileRecord(**record) for name, record in body["files"].items()}
        except FileNotFoundError:
            raise ValueError(f"{MANIFEST} is missing") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            whole = False
        if not whole:
            raise ValueError(f"{MANIFEST} is damaged")
        return cls(body["step"], body["facts"], files, body["chunk"])

    def refuse_other_sizes(self, folder: Path) -> None:
        """Raises ValueError in one phrase where a file in `folder` is missing or of another size."""
        for name, record in self.files.items():
            try:
                size = (folder / name).stat().st_size
            except OSError as error:
                raise ValueError(f"{name} cannot be read ({error.strerror})") from None
            if size != record.size:
                raise ValueError(f"{name} has {size} bytes instead of {record.size}")

    def chunks(self, file: str) -> list[Chunk]:
        """All of a file's."""
        return [Chunk(file, i * self.chunk, self.chunk, stated) for i, stated in enumerate(self.files[file].checksums)]

    def chunks_of(self, entries: Iterable[Entry]) -> list[Chunk]:
        """Those that hold any byte of these tensors."""
        touched: dict[str, set[int]] = {}
        for entry in entries:
            for part in entry.parts:
                end = part.offset + part.num_bytes(entry.dtype)
                touched.setdefault(part.file, set()).update(range(part.offset // self.chunk, -(-end // self.chunk)))
        return [self.chunks(file)[place] for file, places in touched.items() for place in sorted(places)]


def refuse_damage(folder: Path, chunks: Sequence[Chunk]) -> None:
    """Raises ValueError in one phrase for the first of the chunks that is not what was written."""
    with ThreadPoolExecutor(VERIFY_THREADS) as threads:
        for problem in threads.map(lambda chunk: _problem(folder, chunk), chunks):
            if problem is not None:
                raise ValueError(problem)


def _problem(folder: Path, chunk: Chunk) -> str | None:
    try:
        with (folder / chunk.file).open("rb", buffering=0) as file:
            file.seek(chunk.begin)
            crc, left = 0, chunk.size
            while left and (data := file.read(min(left, 1 << 20))):
                crc, left = zlib.crc32(data, crc), left - len(data)
    except OSError as error:
        return f"{chunk.file} cannot be read ({error.strerror})"
    if as_text(crc) != chunk.checksum:
        return f"{chunk.file} is damaged between bytes {chunk.begin} and {chunk.begin + chunk.size}"
    return None


class Part(NamedTuple):
    """A box of a tensor: where it begins in it, its shape, and where its bytes begin in which file."""

    begin: Sequence[int]
    shape: Sequence[int]
    file: str
    offset: int

    def num_bytes(self, dtype: torch.dtype) -> int:
        return math.prod(self.shape) * dtype.itemsize


class Entry(NamedTuple):
    """One tensor of a checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: list[Part]


Table = Mapping[str, Entry]


def read_table(folder: Path) -> Table:
    """The tensors of a checkpoint whose table is whole."""
    return {
        name: Entry(getattr(torch, entry["dtype"]), tuple(entry["shape"]), [Part(*part) for part in entry["parts"]])
        for name, entry in json.loads((folder / TABLE).read_bytes()).items()
    }


def table_text(table: Table) -> str:
    """What is written."""
    return json.dumps(
        {
            name: {"dtype": str(entry.dtype).removeprefix("torch."), "shape": entry.shape, "parts": entry.parts}
            for name, entry in table.items()
        }
    )


class Files:
    """The raw files of a checkpoint, mapped into memory when they are first read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._mapped: dict[str, Tensor] = {}

    def fill(self, target: Tensor, begin: Sequence[int], entry: Entry) -> None:
        """Read the box of a tensor that begins at `begin` and has `target`'s shape, whatever boxes were written."""
        for part in entry.parts:
            here, there = [], []
            for mine, length, its, its_length in zip(begin, target.shape, part.begin, part.shape, strict=True):
                start, stop = max(mine, its), min(mine + length, its + its_length)
                if start >= stop:
                    break
                here.append(slice(start - mine, stop - mine))
                there.append(slice(start - its, stop - its))
            else:
                target[tuple(here)].copy_(self._read(part, entry.dtype)[tuple(there)])

    def _read(self, part: Part, dtype: torch.dtype) -> Tensor:
        if part.file not in self._mapped:
            path = self._folder / part.file
            self._mapped[part.file] = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
        raw = self._mapped[part.file][part.offset : part.offset + part.num_bytes(dtype)]
        return raw.view(dtype).view(tuple(part.shape))


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a checkpoint under `model.<name>`, by name, each read when it is asked for.

    Raises Refused where these, of all that is in it, are not what was written.
    """

    def __init__(self, folder: Path) -> None:
        try:
            manifest = Manifest.read(folder)
            manifest.refuse_other_sizes(folder)
            refuse_damage(folder, manifest.chunks(TABLE))
            table = read_table(folder)
            self._entries = {name.removeprefix(_PREFIX): e for name, e in table.items() if name.startswith(_PREFIX)}
            refuse_damage(folder, manifest.chunks_of(self._entries.values()))
        except (OSError, ValueError) as error:
            raise Refused(f"the checkpoint {folder} is not whole ({fault(error)}).") from None
        self._files = Files(folder)

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        whole = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
        self._files.fill(whole, [0] * whole.ndim, entry)
        return whole

    def shape(self, name: str) -> torch.Size:
        """Known without reading the tensor."""
        return torch.Size(self._entries[name].shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _canonical(body: object) -> bytes:
    return json.dumps(body, sort_keys=True).encode()


def as_text(crc: int) -> str:
    """A checksum as it is written."""
    return f"{crc:08x}"
