"""The model's tensors out of a run's checkpoint, as train/checkpoint writes it: manifest.json, tensors.json, raw files.

Layout-independent: a tensor is put together from the boxes that the ranks wrote. Nothing is unpickled.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conf.schema import Refused, fault

MANIFEST, TABLE = "manifest.json", "tensors.json"
_PREFIX = "model."


class Checkpoint(Mapping[str, Tensor]):
    """The tensors under `model.<name>`, by name, each read when it is asked for.

    Raises Refused where a size or a checksum is not the one that was taken while writing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            problem = _problem(folder)
            table = {} if problem else json.loads((folder / TABLE).read_bytes())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problem, table = _why(error), {}
        if problem:
            raise Refused(f"the checkpoint {folder} is not whole ({problem}).")
        self._entries: dict[str, dict[str, Any]] = {
            name.removeprefix(_PREFIX): entry for name, entry in table.items() if name.startswith(_PREFIX)
        }

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        dtype = getattr(torch, entry["dtype"])
        whole = torch.empty(entry["shape"], dtype=dtype, device="cpu")
        for begin, shape, file, offset in entry["parts"]:
            path = self._folder / file
            raw = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
            box = raw[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            whole[tuple(slice(b, b + length) for b, length in zip(begin, shape, strict=True))] = box
        return whole

    def shape(self, name: str) -> torch.Size:
        """Known without reading the tensor."""
        return torch.Size(self._entries[name]["shape"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _problem(folder: Path) -> str | None:
    """What is wrong with the files, in a phrase."""
    body = json.loads((folder / MANIFEST).read_bytes())
    if body.pop("checksum") != _text(zlib.crc32(json.dumps(body, sort_keys=True).encode())):
        return f"{MANIFEST} is damaged"
    for name, record in body["files"].items():
        path = folder / name
        if path.stat().st_size != record["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {record['size']}"
        with path.open("rb") as file:
            for stated in record["checksums"]:
                if _text(zlib.crc32(file.read(body["chunk"]))) != stated:
                    return f"{name} is damaged"
    return None


def _why(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{Path(error.filename).name} is missing"
    return fault(error) if isinstance(error, OSError) else f"{MANIFEST} or {TABLE} is damaged"


def _text(crc: int) -> str:
    return f"{crc:08x}"
