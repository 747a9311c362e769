"""Tensors in a checkpoint's folder, through torch.distributed.checkpoint's planners: raw bytes and a table of them.

Its planners decide which rank writes and reads which part of which tensor, whatever the layout. Its own file format is
not used: it pickles every tensor under Python's lock, which stalls training for as long, and a pickle can run code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from .files import FileRecord, HashedFile

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


def write_table(folder: Path, table: Mapping[str, Entry]) -> FileRecord:
    """Write `tensors.json`."""
    body = {
        name: {
            "dtype": str(entry.dtype).removeprefix("torch."),
            "shape": entry.shape,
            "parts": [[part.begin, part.shape, part.file, part.offset] for part in entry.parts],
        }
        for name, entry in table.items()
    }
    with HashedFile(folder / TABLE) as file:
        file.write(json.dumps(body).encode())
    return file.record


def read_table(folder: Path) -> dict[str, Entry]:
    """Read `tensors.json` of a verified checkpoint."""
    return {
        name: Entry(
            getattr(torch, entry["dtype"]),
            tuple(entry["shape"]),
            tuple(Part(tuple(begin), tuple(shape), file, offset) for begin, shape, file, offset in entry["parts"]),
        )
        for name, entry in json.loads((folder / TABLE).read_bytes()).items()
    }


class Writer(StorageWriter):
    """Writes a rank's share to `rank_N.bin`, and on the coordinator the table. `records` holds this rank's files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: dict[str, FileRecord] = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        """One writer writes one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Whoever coordinates made the folder already."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Name each rank's file."""
        for rank, plan in enumerate(plans):
            object.__setattr__(plan, "storage_data", f"rank_{rank}.bin")
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the plan's tensors one after the other, each aligned."""
        results = []
        if plan.items:
            name = plan.storage_data
            with HashedFile(self.folder / name) as file:
                for item in plan.items:
                    tensor = planner.resolve_data(item)
                    assert isinstance(tensor, Tensor)
                    file.write(bytes(-file.tell() % ALIGNMENT))
                    part = (tuple(tensor.shape), name, file.tell())
                    data = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
                    file.write(data.data)
                    results.append(WriteResult(item.index, data.nbytes, part))
            self.records[name] = file.record
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the table of what all ranks wrote."""
        parts: dict[str, list[Part]] = {}
        for result in (result for of_rank in results for result in of_rank):
            begin = tuple(result.index.offset or ())
            parts.setdefault(result.index.fqn, []).append(Part(begin, *result.storage_data))
        table = {
            name: Entry(entry.properties.dtype, tuple(entry.size), tuple(parts[name]))
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self.records[TABLE] = write_table(self.folder, table)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class Reader(StorageReader):
    """Reads parts out of memory-mapped files straight into the tensors that are loaded."""

    def __init__(self, folder: Path, table: Mapping[str, Entry]) -> None:
        self.folder = folder
        self.table = table
        self.parts = {(name, part.begin): part for name, entry in table.items() for part in entry.parts}

    def reset(self, checkpoint_id: Any = None) -> None:
        """One reader reads one checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The table, as the planners want it."""
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=entry.dtype),
                    torch.Size(entry.shape),
                    [ChunkStorageMetadata(torch.Size(part.begin), torch.Size(part.shape)) for part in entry.parts],
                )
                for name, entry in self.table.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """The table is here already."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy each part of the plan, narrowed to what is asked of it, into its tensor."""
        mapped: dict[str, Tensor] = {}
        for item in plan.items:
            index: MetadataIndex = item.storage_index
            part = self.parts[index.fqn, tuple(index.offset or ())]
            if part.file not in mapped:
                path = self.folder / part.file
                mapped[part.file] = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
            dtype = self.table[index.fqn].dtype
            num_bytes = math.prod(part.shape) * dtype.itemsize
            source = mapped[part.file][part.offset : part.offset + num_bytes].view(dtype).view(part.shape)
            for dim, (begin, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                source = source.narrow(dim, begin, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(source)
            planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True
