"""Directories of safetensors: one file, or several with an index; read lazily, written aside and renamed into place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from conf.schema import Refused

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"

SHARD_BYTES = 4 * 10**9
"""Size at which a further file is begun."""


class Shards(Mapping[str, Tensor]):
    """The tensors of a directory by name, each read when it is asked for. Raises Refused for what cannot be read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        if (folder / INDEX).is_file():
            wanted = _index(folder / INDEX)
        else:
            wanted = {name: WHOLE for name in self._open(WHOLE).keys()}  # noqa: SIM118  not a mapping
        for file in sorted(set(wanted.values())):
            held = set(self._open(file).keys())
            if lost := {name for name, where in wanted.items() if where == file} - held:
                raise Refused(
                    f"{folder / file} lacks {min(lost)}, which {INDEX} says it holds; copy the directory again."
                )
        self._where = wanted

    def __getitem__(self, name: str) -> Tensor:
        file = self._where[name]
        try:
            return self._open(file).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise Refused(_unreadable(self._folder / file, error)) from None

    def shape(self, name: str) -> torch.Size:
        """Known without reading the tensor."""
        return torch.Size(self._open(self._where[name]).get_slice(name).get_shape())

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = self._folder / file
            if not path.is_file():
                raise Refused(f"{path} is missing, so {self._folder} holds no whole model; copy the directory again.")
            try:
                self._files[file] = self._stack.enter_context(safe_open(path, "pt"))
            except (SafetensorError, OSError) as error:
                raise Refused(_unreadable(path, error)) from None
        return self._files[file]


def write(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES) -> None:
    """Write `tensors` into `folder`, holding no more than one file's worth at a time."""
    where: dict[str, int] = {}
    batch: dict[str, Tensor] = {}
    total = held = num_files = 0

    def flush() -> None:
        try:
            save_file(batch, folder / f"{num_files:05d}", metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"the weights cannot be written to {folder.parent} ({error})") from None
        batch.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if batch and held + size > shard_bytes:
            flush()
            num_files, held = num_files + 1, 0
        # a copy of its own: safetensors refuses views of one storage
        batch[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        where[name] = num_files
        total, held = total + size, held + size
    flush()
    num_files += 1
    names = (
        [WHOLE] if num_files == 1 else [f"model-{i + 1:05d}-of-{num_files:05d}.safetensors" for i in range(num_files)]
    )
    for i, file in enumerate(names):
        (folder / f"{i:05d}").rename(folder / file)
    if num_files > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {name: names[i] for name, i in where.items()}}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """A folder that becomes `target` at the end, and vanishes if anything fails. Raises Refused if it exists."""
    if target.exists() or target.is_symlink():
        raise Refused(f"{target} exists already; name a new directory, or remove it first.")
    aside = target.with_name(f".{target.name}.unfinished")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        aside.rename(target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _index(path: Path) -> dict[str, str]:
    """Tensor to file. Raises Refused for an index that names a place outside its directory."""
    try:
        files = dict(json.loads(path.read_text())["weight_map"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Refused(_unreadable(path, error)) from None
    if strange := [file for file in files.values() if not isinstance(file, str) or Path(file).name != file]:
        raise Refused(f"{path} names {strange[0]!r}, which is no file beside it.")
    return files


def _unreadable(path: Path, error: Exception) -> str:
    return (
        f"{path} cannot be read ({str(error).splitlines()[0] if str(error) else type(error).__name__}); copy it again."
    )
