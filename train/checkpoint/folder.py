"""The folder of a run's checkpoints: names, and the renames that make one appear or go at once."""

from __future__ import annotations

import re
import shutil
from itertools import count
from pathlib import Path

from models.checkpoint import MANIFEST

from .files import sync_folder

PARTIAL, REPLACED, PRUNED = ".partial", ".replaced", ".pruned"


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, once it is complete."""
    return folder / f"step_{step:08d}"


def aside(path: Path, suffix: str) -> Path:
    """The hidden name beside `path` of one that is coming or going; what a killed run leaves under it is cleaned."""
    return path.with_name(f".{path.name}{suffix}")


def step_of(path: Path) -> int:
    """The step that a checkpoint's name tells."""
    return int(path.name.removeprefix("step_"))


def complete(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if re.fullmatch(r"step_\d{8,}", path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def find(path: Path) -> Path | None:
    """The checkpoint meant by a path: one itself, or the newest of a run's folder or of its checkpoints' folder."""
    if (path / MANIFEST).exists() or re.fullmatch(r"step_\d{8,}", path.name):
        return path if path.is_dir() else None
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
