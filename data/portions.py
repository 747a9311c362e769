"""Text files and JSONL as a source: the portions that they are cut into."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from conf.schema import Refused
from data.files import File, Files, describe
from data.records import PORTION, Record
from data.text import Chunk, read_records

PACKED = {".gz", ".bgz", ".tgz", ".zst", ".bz2", ".xz", ".lzma", ".lz4", ".br", ".z", ".zip", ".7z", ".rar", ".tar"}
TABLES = {".arrow", ".feather", ".orc"}
SMALLEST = 256 << 10  # bytes of a portion
FILE = 4 << 10  # bytes that a file counts beside its text, so that a portion names no more files than can be held


@dataclass(frozen=True)
class FilePortion:
    """Consecutive chunks of files."""

    chunks: list[Chunk]
    text_key: str
    max_document: int

    def records(self) -> Iterator[Record]:
        for chunk in self.chunks:
            yield from read_records(chunk, self.text_key, self.max_document)


@dataclass(frozen=True)
class FileTexts:
    """`files` of the source that is called `name`, as Texts. Whatever is asked of them is read off the list anew."""

    name: str
    files: Files
    text_key: str
    max_document: int

    @cached_property
    def fingerprint(self) -> str:
        return self.files.fingerprint()

    @cached_property
    def plan(self) -> str:
        digest = hashlib.sha256()
        for chunks in self._cut():
            for chunk in chunks:
                digest.update(os.fsencode(f"{chunk.name}\0{chunk.modified}\0{chunk.begin}\0{chunk.end}\0"))
            digest.update(b"\0")
        return digest.hexdigest()

    @cached_property
    def size(self) -> int | None:
        if any(file.is_compressed for file in self.files):
            return None  # of the text, that is
        return sum(file.size for file in self.files)

    @cached_property
    def many(self) -> bool:
        return any(file.is_lines for file in self.files)

    def names(self) -> Iterator[str]:
        return (file.name for file in self.files)

    def portions(self) -> Iterator[FilePortion]:
        return (FilePortion(chunks, self.text_key, self.max_document) for chunks in self._cut())

    def check_unchanged(self) -> None:
        """Each portion does it, of each of its files."""

    def _cut(self) -> Iterator[list[Chunk]]:
        total = sum(file.size + FILE for file in self.files)
        return cut(self.files, min(max(total // 256, SMALLEST), PORTION), self.max_document)


def open_files(source: str, files: Files, text_key: str, max_document: int) -> FileTexts:
    """The text and JSONL files of `source`. Raises Refused where a file holds documents in a form that is no text."""
    for file in files:
        if Path(file.name).suffix.lower() in PACKED | TABLES and not file.is_compressed:
            raise Refused(f"{file.path} holds no plain text; decompress it, or open it with source=datasets:NAME.")
    return FileTexts(describe(source), files, text_key, max_document)


def cut(files: Iterable[File], size: int, max_document: int) -> Iterator[list[Chunk]]:
    """Portions of about `size` bytes, that depend on the files alone and not on how many processes there are."""
    portion: list[Chunk] = []
    filled = 0
    for file in files:
        step = max(file.size, 1) if file.is_compressed else size if file.is_lines else max_document
        for begin in range(0, max(file.size, 1), step):
            if filled >= size:
                yield portion
                portion, filled = [], 0
            end = min(begin + step, file.size)
            portion.append(
                Chunk(file.name, file.path, file.size, file.modified, begin, end, file.is_lines, file.is_compressed)
            )
            filled += end - begin + FILE
    yield portion
