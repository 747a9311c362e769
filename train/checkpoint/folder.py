"""The folder of a run's checkpoints: the renames that make one appear or go at once."""

from __future__ import annotations

import shutil
from itertools import count
from pathlib import Path

from models.checkpoint import MANIFEST, complete, is_complete, step_of

from .files import sync_folder

PARTIAL, REPLACED, PRUNED = ".partial", ".replaced", ".pruned"


def aside(path: Path, suffix: str) -> Path:
    """The hidden name beside `path` of one that is coming or going; what a killed run leaves under it is cleaned."""
    return path.with_name(f".{path.name}{suffix}")


def find(path: Path) -> Path | None:
    """The checkpoint meant by a path: one itself, or the newest of a run's folder or of its checkpoints' folder."""
    if (path / MANIFEST).exists() or is_complete(path):
        return path
    return next(iter(complete(path) or complete(path / "checkpoints")), None)


def clean(folder: Path) -> list[str]:
    """Remove what a killed run left unfinished; return the names of what was removed."""
    folder.mkdir(parents=True, exist_ok=True)
    removed = []
    for path in sorted(folder.glob(".step_*")):
        original = folder / path.name.removeprefix(".").removesuffix(REPLACED)
        if path.suffix == REPLACED and not original.exists():
            path.rename(original)  # killed between the two renames of `publish`
            continue
        _remove(path)
        removed.append(path.name)
    return removed


def publish(partial: Path, path: Path) -> None:
    """Rename a finished checkpoint into place, over one of the same step if there is one."""
    sync_folder(partial)
    replaced = aside(path, REPLACED)
    if path.exists():
        path.rename(replaced)
    partial.rename(path)
    sync_folder(path.parent)
    if replaced.exists():
        _remove(replaced)


def prune(folder: Path, keep: int, keep_every: int | None) -> None:
    """Remove all but the newest `keep` and those of steps that `keep_every` divides."""
    for path in complete(folder)[keep:]:
        if not keep_every or step_of(path) % keep_every:
            going = aside(path, PRUNED)
            path.rename(going)
            _remove(going)


def _remove(path: Path) -> None:
    """Of a link, the link: somebody keeps the checkpoint where it leads."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def set_aside(path: Path) -> Path:
    """Rename a bad checkpoint so that nobody takes it for one, and keep it; return its new path."""
    names = (path.with_name(f"{path.name}.bad{number or ''}") for number in count())
    bad = next(name for name in names if not name.exists())
    return path.rename(bad)
