"""Which files a source means, listed once."""

from __future__ import annotations

import glob
import hashlib
import os
import platform
import sqlite3
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from conf.schema import Refused

STDLIB = "stdlib"
STDLIB_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True, slots=True)
class File:
    """A file of a source. name: relative to the source and the same on every machine; it decides order and split."""

    name: str
    path: str
    size: int
    modified: int

    @property
    def is_lines(self) -> bool:
        return self.name.endswith((".jsonl", ".jsonl.gz"))

    @property
    def is_compressed(self) -> bool:
        return self.name.endswith(".jsonl.gz")


class Files:
    """Files, each once, in the order of their names' bytes, however often they are asked for.

    There may be millions, so SQLite keeps and sorts them, in a temporary file without a name.
    """

    def __init__(self, found: Iterable[File]) -> None:
        # a trainer of tokenizers asks from threads of its own
        self._kept = sqlite3.connect("", check_same_thread=False)
        self._kept.execute("CREATE TABLE file (name BLOB PRIMARY KEY, path BLOB, size INT, modified INT) WITHOUT ROWID")
        rows = ((os.fsencode(file.name), os.fsencode(file.path), file.size, file.modified) for file in found)
        self._kept.executemany("INSERT OR IGNORE INTO file VALUES (?, ?, ?, ?)", rows)
        self._kept.commit()

    def __iter__(self) -> Iterator[File]:
        for name, path, size, modified in self._kept.execute("SELECT * FROM file ORDER BY name"):
            yield File(os.fsdecode(name), os.fsdecode(path), size, modified)

    def fingerprint(self) -> str:
        """Hash of names and sizes."""
        digest = hashlib.sha256()
        for file in self:
            digest.update(os.fsencode(f"{file.name}\0{file.size}\0"))
        return digest.hexdigest()


def list_files(source: str) -> Files:
    """The files that `source` means. Raises Refused where there are none or one cannot be read.

    `stdlib` is the running Python's standard library source without its tests; else a file, a folder (every file
    below it but hidden ones) or a glob. A link to a file is that file; links to folders are not followed, since they
    may lead in circles; stderr says how many there were, with pipes and sockets.
    """
    try:
        root, paths = _find(source)
        files = Files(_look_at(path, root) for path in paths)
    except OSError as error:
        raise Refused(f"source '{source}' cannot be listed: {error}.") from None
    except sqlite3.Error as error:
        raise RuntimeError(
            f"the list of files does not go into a temporary file ({error}); set TMPDIR to a folder with room for it"
        ) from None
    if next(iter(files), None) is None:
        raise Refused(f"source '{source}' names no file; give 'stdlib', a file, a folder, a glob or datasets:NAME.")
    return files


def check_unchanged(path: str, size: int, modified: int, found: os.stat_result) -> None:
    """Raises OSError where a file that was listed with that size and time of change has another now."""
    if found.st_size != size:
        raise OSError(f"{path} changed while it was read: {found.st_size} bytes where it had {size}")
    if found.st_mtime_ns != modified:
        raise OSError(f"{path} changed while it was read: it was written to after it was listed")


def may(path: Path, mode: int) -> bool:
    """Whether this user may do to `path` what `os.R_OK` or another `mode` says."""
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def describe(source: str) -> str:
    """The source in words, without a machine's paths."""
    if source == STDLIB:
        return f"the standard library of Python {platform.python_version()}, *.py without its tests"
    return Path(os.path.abspath(source)).name


def _look_at(path: Path, root: Path) -> File:
    facts = path.stat()
    if not may(path, os.R_OK):
        raise Refused(f"{path} may not be read by this user; change its mode, or leave it out of the source.")
    return File(path.relative_to(root).as_posix(), str(path), facts.st_size, facts.st_mtime_ns)


def _find(source: str) -> tuple[Path, Iterator[Path]]:
    """The folder to which names are relative, and the paths."""
    if source == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        below = _walk(root, STDLIB_LEFT_OUT)
        return root, (path for path in below if path.suffix == ".py" and "_sysconfigdata" not in path.name)
    path = Path(source)
    if path.is_dir():
        return path, _walk(path, set())
    if path.is_file():
        return path.parent, iter([path])
    root = Path(*_before_magic(path.parts))
    pattern = path.parts[len(root.parts) :]
    if "**" in pattern:  # which would take glob through links to folders, in circles
        return root, (found for found in _walk(root, set()) if _fits(found.relative_to(root).parts, pattern))
    return root, (found for match in glob.iglob(source) if (found := Path(match)).is_file())


def _walk(root: Path, left_out: set[str]) -> Iterator[Path]:
    """The files below `root`, without folders that are left out by name. Holds no more than folders still to see."""
    left = 0
    folders = [root]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                path = Path(entry.path)
                if entry.is_dir(follow_symlinks=False):
                    if entry.name not in left_out:
                        folders.append(path)
                elif path.is_file():
                    yield path
                else:
                    left += 1
    if left:
        print(f"{left} links to folders or to nowhere, pipes or sockets below {root} were not read.", file=sys.stderr)


def _fits(names: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether the parts of a path are what those of a glob say; `**` stands for any number of them."""
    if not pattern:
        return not names
    if pattern[0] == "**":
        return any(_fits(names[begin:], pattern[1:]) for begin in range(len(names) + 1))
    return bool(names) and fnmatchcase(names[0], pattern[0]) and _fits(names[1:], pattern[1:])


def _before_magic(parts: tuple[str, ...]) -> Iterator[str]:
    for part in parts:
        if glob.has_magic(part):
            return
        yield part
