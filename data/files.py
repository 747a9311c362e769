"""Text files and JSONL: which files a source means, and the portions that they are cut into."""

from __future__ import annotations

import glob
import hashlib
import os
import platform
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from conf.schema import Refused
from data.records import PORTION, Record, Texts
from data.text import Chunk, read_records

STDLIB = "stdlib"
STDLIB_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
PACKED = {".gz", ".bgz", ".tgz", ".zst", ".bz2", ".xz", ".lzma", ".lz4", ".br", ".z", ".zip", ".7z", ".rar", ".tar"}
TABLES = {".arrow", ".feather", ".orc"}


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


@dataclass(frozen=True)
class FilePortion:
    """A portion of files: consecutive chunks of them."""

    chunks: list[Chunk]
    text_key: str
    max_document: int

    @property
    def size(self) -> int | None:
        if any(chunk.is_compressed for chunk in self.chunks):
            return None  # of the text, that is
        return sum(chunk.end - chunk.begin for chunk in self.chunks)

    def records(self) -> Iterator[Record]:
        for chunk in self.chunks:
            yield from read_records(chunk, self.text_key, self.max_document)


def open_files(source: str, files: list[File], text_key: str, max_document: int) -> Texts:
    """The text and JSONL files of `source`. Raises Refused where a file holds documents in a form that is no text."""
    for file in files:
        if Path(file.name).suffix.lower() in PACKED | TABLES and not file.is_compressed:
            raise Refused(f"{file.path} holds no plain text; decompress it, or open it with source=datasets:NAME.")
    portions = cut(files, max_document)
    return Texts(
        name=describe(source),
        fingerprint=listing(files),
        plan=[[file.modified for file in files], [[(p.name, p.begin, p.end) for p in chunks] for chunks in portions]],
        files=[file.name for file in files],
        many=any(file.is_lines for file in files),
        portions=[FilePortion(chunks, text_key, max_document) for chunks in portions],
    )


def list_files(source: str) -> list[File]:
    """The files that `source` means, in order of name. Raises Refused where there are none or one cannot be read.

    `stdlib` is the running Python's standard library source without its tests; else a file, a folder (every file
    below it but hidden ones) or a glob. A link to a file is that file; links to folders are not followed, since they
    may lead in circles, and stderr says how many there were.
    """
    try:
        root, paths = _find(source)
        files = []
        for path in paths:
            facts = path.stat()
            files.append(File(path.relative_to(root).as_posix(), str(path), facts.st_size, facts.st_mtime_ns))
    except OSError as error:
        raise Refused(f"source '{source}' cannot be listed: {error}.") from None
    if not files:
        raise Refused(f"source '{source}' names no file; give 'stdlib', a file, a folder, a glob or datasets:NAME.")
    for file in files:
        if not os.access(file.path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
            raise Refused(f"{file.path} may not be read by this user; change its mode, or leave it out of the source.")
    return sorted(files, key=lambda file: os.fsencode(file.name))


def describe(source: str) -> str:
    """The source in words, without a machine's paths."""
    if source == STDLIB:
        return f"the standard library of Python {platform.python_version()}, *.py without its tests"
    return Path(source).name


def listing(files: Iterable[File]) -> str:
    """Hash of names and sizes."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(os.fsencode(f"{file.name}\0{file.size}\0"))
    return digest.hexdigest()


def cut(files: list[File], max_document: int) -> list[list[Chunk]]:
    """Portions of about equal size, that depend on the files alone and not on how many processes there are."""
    size = min(max(sum(f.size for f in files) // 256, 256 << 10), PORTION)
    portions: list[list[Chunk]] = [[]]
    filled = 0
    for file in files:
        step = max(file.size, 1) if file.is_compressed else size if file.is_lines else max_document
        for begin in range(0, max(file.size, 1), step):
            if filled >= size:
                portions.append([])
                filled = 0
            end = min(begin + step, file.size)
            portions[-1].append(
                Chunk(file.name, file.path, file.size, file.modified, begin, end, file.is_lines, file.is_compressed)
            )
            filled += end - begin
    return portions


def _find(source: str) -> tuple[Path, list[Path]]:
    """The folder to which names are relative, and the paths."""
    if source == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        return root, [p for p in _walk(root, STDLIB_LEFT_OUT) if p.suffix == ".py" and "_sysconfigdata" not in p.name]
    path = Path(source)
    if path.is_dir():
        return path, list(_walk(path, set()))
    if path.is_file():
        return path.parent, [path]
    root = Path(*_before_magic(path.parts))
    return root, [found for match in glob.glob(source, recursive=True) if (found := Path(match)).is_file()]


def _walk(root: Path, left_out: set[str]) -> Iterator[Path]:
    links = 0
    for folder, folders, names in os.walk(root, onerror=_raise):
        folders[:] = [name for name in folders if name not in left_out and not name.startswith(".")]
        links += sum(os.path.islink(os.path.join(folder, name)) for name in folders)
        for name in names:
            path = Path(folder, name)
            if name.startswith("."):
                continue
            if path.is_file():
                yield path
            else:
                links += path.is_symlink()
    if links:
        print(f"{links} symbolic links to folders or to nowhere below {root} were not followed.", file=sys.stderr)


def _raise(error: OSError) -> None:
    raise error


def _before_magic(parts: tuple[str, ...]) -> Iterator[str]:
    for part in parts:
        if glob.has_magic(part):
            return
        yield part
