"""Where text comes from: the files that a source means, their pieces of work, and the documents in them."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from conf.schema import Refused

STDLIB = "stdlib"
STDLIB_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
MAX_FILE = 1 << 30  # bytes; a text file is one document and is held in memory

EMPTY = "empty document: nothing but white space"
NOT_UTF8 = "invalid UTF-8"
MALFORMED = "malformed JSON line: not one JSON object"
NO_TEXT = "JSON line without text under the text key"


@dataclass(frozen=True)
class File:
    """A file of a source. name: relative to the source and the same on every machine; it decides order and split."""

    name: str
    path: str
    size: int
    modified: int

    @property
    def is_lines(self) -> bool:
        return self.name.endswith(".jsonl")


@dataclass(frozen=True)
class Piece:
    """Bytes [begin, end) of a file: all of a text file, or the lines of a JSONL file that begin there."""

    name: str
    path: str
    begin: int
    end: int
    is_lines: bool


def list_files(source: str) -> list[File]:
    """The files that `source` means, in order of name. Raises Refused where there are none or one is too large.

    `stdlib` is the running Python's standard library source without its tests; else a file, a folder (every file
    below it but hidden ones) or a glob.
    """
    if source == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = [p for p in _walk(root, STDLIB_LEFT_OUT) if p.suffix == ".py" and "_sysconfigdata" not in p.name]
    elif Path(source).is_dir():
        root = Path(source)
        paths = list(_walk(root, set()))
    elif Path(source).is_file():
        root = Path(source).parent
        paths = [Path(source)]
    else:
        root = Path(*_before_magic(Path(source).parts))
        paths = [path for match in glob.glob(source, recursive=True) if (path := Path(match)).is_file()]
    files = []
    for path in paths:
        facts = path.stat()
        files.append(File(path.relative_to(root).as_posix(), str(path), facts.st_size, facts.st_mtime_ns))
    if not files:
        raise Refused(f"source '{source}' names no file; give 'stdlib', a file, a folder or a glob.")
    for file in files:
        if file.size > MAX_FILE and not file.is_lines:
            raise Refused(f"{file.path} is over 1 GiB and would be one document; cut it, or make it JSONL.")
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


def cut(files: list[File]) -> list[list[Piece]]:
    """Parts of work of about equal size, that depend on the files alone and not on how many processes there are."""
    size = min(max(sum(f.size for f in files) // 256, 256 << 10), 64 << 20)
    parts: list[list[Piece]] = [[]]
    filled = 0
    for file in files:
        step = size if file.is_lines else max(file.size, 1)
        for begin in range(0, file.size, step):
            if filled >= size:
                parts.append([])
                filled = 0
            piece = Piece(file.name, file.path, begin, min(begin + step, file.size), file.is_lines)
            parts[-1].append(piece)
            filled += piece.end - begin
        if file.size == 0:
            parts[-1].append(Piece(file.name, file.path, 0, 0, file.is_lines))
    return parts


class Digest:
    """The sum over records of a hash of each with its file and place: the same however the files are cut."""

    def __init__(self) -> None:
        self.total = 0

    def add(self, name: str, offset: int, record: bytes) -> None:
        digest = hashlib.blake2b(os.fsencode(f"{name}\0{offset}\0"), digest_size=16)
        digest.update(record)
        self.total = (self.total + int.from_bytes(digest.digest(), "big")) % 2**128


def read_documents(piece: Piece, text_key: str, skipped: Counter[str], digest: Digest) -> Iterator[tuple[int, str]]:
    """Each document of a piece with the offset in the file at which it begins.

    What is left out is counted in `skipped` by rule, except blank lines of JSONL, which are no documents. Every byte
    read goes into `digest`. A byte-order mark at the start of a file is no text.
    """
    for offset, raw in _records(piece):
        digest.add(piece.name, offset, raw)
        try:
            text = raw.decode("utf-8-sig" if offset == 0 else "utf-8")
            if piece.is_lines:
                if not text.strip():
                    continue
                text = _text_of(text, text_key)
                text.encode()  # JSON can spell half a surrogate pair, which is no text
        except UnicodeError:
            skipped[NOT_UTF8] += 1
        except _Skip as skip:
            skipped[str(skip)] += 1
        else:
            if text.strip():
                yield offset, text
            else:
                skipped[EMPTY] += 1


class _Skip(Exception):
    """A record that is no document; says by which rule."""


def _text_of(line: str, text_key: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise _Skip(MALFORMED) from None
    if not isinstance(record, dict):
        raise _Skip(MALFORMED)
    if not isinstance(record.get(text_key), str):
        raise _Skip(NO_TEXT)
    return record[text_key]


def _records(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of a whole text file, or of each line that begins in the piece."""
    with open(piece.path, "rb") as file:
        if not piece.is_lines:
            yield 0, file.read()
            return
        if piece.begin:  # a line that begins before the piece belongs to the piece before
            file.seek(piece.begin - 1)
            file.readline()
        while (offset := file.tell()) < piece.end and (line := file.readline()):
            yield offset, line


def _walk(root: Path, left_out: set[str]) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in left_out and not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                yield path


def _before_magic(parts: tuple[str, ...]) -> Iterator[str]:
    for part in parts:
        if glob.has_magic(part):
            return
        yield part
