"""Who writes which part of which tensor: agreed on once, since the tensors of a run lie where they lie."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from models.checkpoint import Entry, FileRecord, Part, table_text
from parallel.box import box_of

from .files import HashedFile, as_bytes
from .peers import Peers

ALIGNMENT = 64  # bytes; so that a mapped file's bytes can be viewed as any dtype


@dataclass(frozen=True)
class Plan:
    """layout: of the tensors that it was made for. mine: what this rank writes, by name, in this order.

    table: on rank 0 the text of the table of all parts, elsewhere empty.
    """

    layout: list[tuple[Any, ...]]
    mine: Mapping[str, Part]
    table: str

    def write(
        self, folder: Path, parts: Mapping[str, Tensor], pace: Callable[[float], object]
    ) -> dict[str, FileRecord]:
        """Write this rank's parts, contiguous and on the host, into its file, if any, at the pace of HashedFile."""
        if not self.mine:
            return {}
        (name,) = {part.file for part in self.mine.values()}
        with HashedFile(folder / name, pace) as file:
            for tensor, part in self.mine.items():
                file.write(bytes(part.offset - file.record.size))
                file.write(as_bytes(parts[tensor]).data)
        return {name: file.record}


def layout(tensors: Mapping[str, Tensor]) -> list[tuple[Any, ...]]:
    """What a plan depends on; quick to ask."""
    return [
        (name, tensor.dtype, tensor.shape, tensor.placements if isinstance(tensor, DTensor) else None)
        for name, tensor in tensors.items()
    ]


def agree(peers: Peers, tensors: Mapping[str, Tensor]) -> Plan:
    """Collective. Raises RankFailed where the parts that the ranks hold do not make up a tensor."""
    mine, table = peers.meet(lambda: _held(tensors, first=peers.rank == 0), _share_out)
    return Plan(layout(tensors), mine, table)


class Held(NamedTuple):
    """What a rank holds of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: tuple[int, ...]
    part_shape: tuple[int, ...]


def _held(tensors: Mapping[str, Tensor], *, first: bool) -> dict[str, Held]:
    """A tensor that is not sharded is rank 0's, like every plain value."""
    held = {}
    for name, tensor in tensors.items():
        if first or isinstance(tensor, DTensor):
            begin, local = box_of(tensor)
            held[name] = Held(tensor.dtype, tuple(tensor.shape), begin, tuple(local.shape))
    return held


def _share_out(ranks: list[dict[str, Held]]) -> list[tuple[dict[str, Part], str]]:
    """Of the ranks that hold the same part, the one that has least to write so far writes it."""
    holders: dict[tuple[str, Held], list[int]] = {}
    for rank, held in enumerate(ranks):
        for item in held.items():
            holders.setdefault(item, []).append(rank)
    shares: list[dict[str, Part]] = [{} for _ in ranks]
    sizes = [0] * len(ranks)
    table: dict[str, Entry] = {}
    for (name, box), having in holders.items():
        entry = table.setdefault(name, Entry(box.dtype, box.shape, []))
        if math.prod(box.part_shape):
            writer = min(having, key=sizes.__getitem__)
            offset = -(-sizes[writer] // ALIGNMENT) * ALIGNMENT
            part = Part(box.begin, box.part_shape, f"rank_{writer}.bin", offset)
            sizes[writer] = offset + part.num_bytes(box.dtype)
            shares[writer][name] = part
            entry.parts.append(part)
    for name, entry in table.items():
        if (found := sum(math.prod(part.shape) for part in entry.parts)) != math.prod(entry.shape):
            raise ValueError(f"of {name}, which is {list(entry.shape)}, the ranks hold {found} elements together")
    return [(share, "" if rank else table_text(table)) for rank, share in enumerate(shares)]
