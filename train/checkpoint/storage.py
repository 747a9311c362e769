"""Tensors in a checkpoint's folder: raw bytes, and a table of which bytes are which rows of which tensor.

The planners of torch.distributed.checkpoint decide which rank writes and reads which part of a tensor, whatever the
layouts. Its file format is not used: that pickles every tensor under Python's lock, which stalls training for as long,
and reading a pickle can run code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan

from .files import FileRecord, HashedFile, as_bytes
from .peers import Peers

TABLE = "tensors.json"
ALIGNMENT = 64  # bytes; so that a mapped file's bytes can be viewed as any dtype


@dataclass(frozen=True)
class Part:
    """A box of a tensor: where it begins in it, its shape, and where its bytes begin in which file."""

    begin: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    offset: int


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


Table = Mapping[str, Entry]


@dataclass(frozen=True)
class Written:
    """What a rank wrote: its file, if it had anything to write, and the parts of which tensors are in it."""

    files: dict[str, FileRecord]
    parts: list[tuple[str, Part]]


class TensorWriter:
    """Writes tensors that are spread over ranks, each part once."""

    def __init__(self, peers: Peers, tensors: Mapping[str, Tensor]) -> None:
        """Agree on who writes what. Collective."""
        self._rank = peers.rank
        # Of copies, the lowest rank's is written: a tensor that is not sharded is rank 0's, like every plain value.
        self._planner = DefaultSavePlanner(
            flatten_state_dict=False, flatten_sharded_tensors=False, dedup_save_to_lowest_rank=True
        )
        self._planner.set_up_planner(dict(tensors), is_coordinator=peers.rank == 0)
        self._metadata = Metadata({})
        self._plan = self._planner.finish_plan(peers.meet(self._planner.create_local_plan, self._share_out))

    def _share_out(self, plans: list[SavePlan]) -> list[SavePlan]:
        plans, self._metadata = self._planner.create_global_plan(plans)
        return plans

    def write(self, folder: Path, pace: Callable[[float], object]) -> Written:
        """Write this rank's share into one file, at the pace of HashedFile."""
        written = Written({}, [])
        if not self._plan.items:
            return written
        name = f"rank_{self._rank}.bin"
        with HashedFile(folder / name, pace) as file:
            for item in self._plan.items:
                tensor = self._planner.resolve_data(item)
                assert isinstance(tensor, Tensor)
                file.write(bytes(-file.record.size % ALIGNMENT))
                begin = tuple(item.index.offset or ())
                written.parts.append((item.index.fqn, Part(begin, tuple(tensor.shape), name, file.record.size)))
                file.write(as_bytes(tensor.detach().contiguous()).data)
        written.files[name] = file.record
        return written

    def write_table(self, folder: Path, parts: Iterable[tuple[str, Part]]) -> FileRecord:
        """On rank 0: write the table of the parts that all ranks wrote."""
        by_name: dict[str, list[Part]] = {}
        for name, part in parts:
            by_name.setdefault(name, []).append(part)
        body = {
            name: {
                "dtype": str(entry.properties.dtype).removeprefix("torch."),
                "shape": entry.size,
                "parts": [[part.begin, part.shape, part.file, part.offset] for part in by_name[name]],
            }
            for name, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        with HashedFile(folder / TABLE) as file:
            file.write(json.dumps(body).encode())
        return file.record


def read_table(folder: Path) -> Table:
    """The table of a verified checkpoint."""
    return {
        name: Entry(
            getattr(torch, entry["dtype"]),
            tuple(entry["shape"]),
            tuple(Part(tuple(begin), tuple(shape), file, offset) for begin, shape, file, offset in entry["parts"]),
        )
        for name, entry in json.loads((folder / TABLE).read_bytes()).items()
    }


def read_tensors(folder: Path, table: Table, tensors: Mapping[str, Tensor]) -> None:
    """Fill this rank's part of each of `tensors` in place, from memory-mapped files. Not collective."""
    parts = {(name, part.begin): part for name, entry in table.items() for part in entry.parts}
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), _metadata({name: table[name] for name in tensors}), is_coordinator=False)
    mapped: dict[str, Tensor] = {}
    for item in planner.finish_plan(planner.create_local_plan()).items:
        name = item.storage_index.fqn
        part = parts[name, tuple(item.storage_index.offset or ())]
        if part.file not in mapped:
            path = folder / part.file
            mapped[part.file] = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
        dtype = table[name].dtype
        end = part.offset + math.prod(part.shape) * dtype.itemsize
        source = mapped[part.file][part.offset : end].view(dtype).view(part.shape)
        for dim, (begin, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            source = source.narrow(dim, begin, length)
        target = planner.resolve_tensor(item).detach()
        target.copy_(source)
        planner.commit_tensor(item, target)


def _metadata(table: Table) -> Metadata:
    """The table, as the planners want it."""
    return Metadata(
        {
            name: TensorStorageMetadata(
                TensorProperties(dtype=entry.dtype),
                torch.Size(entry.shape),
                [ChunkStorageMetadata(torch.Size(part.begin), torch.Size(part.shape)) for part in entry.parts],
            )
            for name, entry in table.items()
        }
    )
