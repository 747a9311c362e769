"""The records in a chunk of a text file or of JSONL.

A text file is one document. One over the limit becomes several, cut at multiples of the limit, moved back to a line's
end, so that each chunk finds its own borders. JSONL is read line by line, and no line is held beyond 8 times the limit.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, cast

from data.files import check_unchanged
from data.records import (
    MALFORMED,
    NO_TEXT,
    NOT_UTF8,
    TOO_LONG,
    Record,
    before,
    hash64,
    look_back,
    place_digest,
    record,
    records,
)

BOM = b"\xef\xbb\xbf"
LINE = 8  # a JSON line may be this many times as long as a document: escapes make it longer than its text


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes [begin, end) of a file of `size` bytes: of a text file, or the lines of JSONL that begin there.

    modified: nanoseconds, when the file was listed.
    A compressed file is always one chunk, since it can only be read from its beginning.
    """

    name: str
    path: str
    size: int
    modified: int
    begin: int
    end: int
    is_lines: bool
    is_compressed: bool = False


def read_records(chunk: Chunk, text_key: str, max_document: int) -> Iterator[Record]:
    """The records of a chunk. Raises OSError where the file cannot be read or changed since it was listed.

    A byte-order mark at the start of a file is no text. Blank lines of JSONL are no documents.
    """
    with open(chunk.path, "rb") as file:
        _check_unchanged(chunk, file)
        if not chunk.is_lines:
            yield (
                _whole(chunk, file, max_document)
                if chunk.size <= max_document
                else _one_of_several(chunk, file, max_document)
            )
        elif chunk.is_compressed:
            try:
                with gzip.GzipFile(fileobj=file) as unpacked:
                    yield from _lines(chunk, cast(BinaryIO, unpacked), None, text_key, max_document)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise OSError(f"{chunk.path} is a damaged gzip file ({error})") from None
        else:
            yield from _lines(chunk, file, chunk.end, text_key, max_document)
        _check_unchanged(chunk, file)


def _check_unchanged(chunk: Chunk, file: BinaryIO) -> None:
    check_unchanged(chunk.path, chunk.size, chunk.modified, os.fstat(file.fileno()))


def _whole(chunk: Chunk, file: BinaryIO, max_document: int) -> Record:
    content = file.read()
    digest = place_digest(chunk.name, 0, content)
    content = content.removeprefix(BOM)
    return record(content, file=chunk.name, document=hash64(content), digest=digest)


def _one_of_several(chunk: Chunk, file: BinaryIO, limit: int) -> Record:
    """One of the documents that a text file over the limit becomes."""

    def border(at: int) -> int:
        if at in (0, chunk.size):
            return at
        file.seek(at - look_back(limit))
        return at - before(file.read(look_back(limit)))

    begin, end = border(chunk.begin), border(chunk.end)
    file.seek(begin)
    content = file.read(end - begin)
    digest = place_digest(chunk.name, begin, content)
    if begin == 0:
        content = content.removeprefix(BOM)
    return record(content, file=chunk.name, document=hash64(os.fsencode(chunk.name)), digest=digest, cut=begin == 0)


def _lines(chunk: Chunk, file: BinaryIO, end: int | None, text_key: str, max_document: int) -> Iterator[Record]:
    limit = LINE * max_document
    offset = chunk.begin
    if offset:  # a line that begins before the chunk belongs to the chunk before
        file.seek(offset - 1)
        offset += sum(map(len, _rest_of_line(file, limit))) - 1
    while (end is None or offset < end) and (line := file.readline(limit + 1)):
        length = len(line)
        digest = place_digest(chunk.name, offset, line)
        if length > limit and not line.endswith(b"\n"):
            for more in _rest_of_line(file, limit):
                digest += place_digest(chunk.name, offset + length, more)
                length += len(more)
            yield Record(chunk.name, None, TOO_LONG, 0, digest)
        else:
            yield from _line(line.removeprefix(BOM) if offset == 0 else line, chunk, digest, text_key, max_document)
        offset += length


def _line(line: bytes, chunk: Chunk, digest: int, text_key: str, max_document: int) -> Iterator[Record]:
    rule = None
    try:
        text = line.decode()
        if text.strip():
            found = json.loads(text)
            if not isinstance(found, dict):
                rule = MALFORMED
            elif not isinstance(found.get(text_key), str):
                rule = NO_TEXT
            else:  # JSON can spell half a surrogate pair, which is no text
                yield from records(found[text_key].encode(), max_document, file=chunk.name, digest=digest)
                return
    except UnicodeError:
        rule = NOT_UTF8
    except (ValueError, RecursionError):
        rule = MALFORMED
    yield Record(chunk.name, None, rule, 0, digest)


def _rest_of_line(file: BinaryIO, limit: int) -> Iterator[bytes]:
    while block := file.readline(limit):
        yield block
        if block.endswith(b"\n"):
            return
