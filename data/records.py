"""What `prepare` reads: records, each a document or what is left out in its place, by a stated rule.

A source is cut into portions that one worker each reads in order. Nothing is held whole but one record, and no record
is longer than a stated limit: a longer document becomes several.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

EMPTY = "empty document: nothing but white space"
NOT_UTF8 = "invalid UTF-8"
MALFORMED = "malformed JSON line: not one JSON object"
NO_TEXT = "no text under the text key"
TOO_LONG = "JSON line over 8 times max_document"

PORTION = 8 << 20  # bytes of text that are held at once; the memory of a worker is a multiple of this


@dataclass(frozen=True, slots=True)
class Record:
    """A document, or what stands in its place.

    file:     the file's name; empty for a row of a dataset.
    text:     the document; None where there is none.
    skipped:  the rule by which it was left out; None for a document and for a blank line, which counts as nothing.
    document: 64 bits that name the whole document by its content (a text file over the limit by its name).
    digest:   128 bits of its bytes and place; their sum over a source names all that was read, however it was cut.
    cut:      whether it is the first of several that one document over the limit became.
    """

    file: str
    text: str | None
    skipped: str | None
    document: int
    digest: int
    cut: bool = False


class Portion(Protocol):
    """A part of a source that one worker reads in order. It travels to the worker."""

    def records(self) -> Iterator[Record]:
        """The same records each time. Raises OSError where the source fails or changed since it was listed."""
        ...


class Texts(Protocol):
    """A source, listed but not read.

    name:        in words, without a machine's paths.
    fingerprint: of what tells one source from another (names and sizes of files).
    plan:        hash of what further decides how the work is cut: parts made under another plan are not used again.
    size:        bytes of all portions, markup included; None where they are not known before reading.
    many:        whether a file holds many documents.
    """

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def plan(self) -> str: ...
    @property
    def size(self) -> int | None: ...
    @property
    def many(self) -> bool: ...

    def names(self) -> Iterator[str]:
        """Of its files, of which some may be held out whole; none where a source is no files."""
        ...

    def portions(self) -> Iterator[Portion]:
        """The same each time, of one type, and at least one; made as they are asked for, since there may be many."""
        ...

    def check_unchanged(self) -> None:
        """Once all is read: raises OSError where the source changed since it was listed and no portion could tell."""
        ...


def hash64(content: bytes) -> int:
    """64 bits of `content`."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def place_digest(file: str, offset: int, content: bytes) -> int:
    """128 bits of `content` and of where it stands."""
    digest = hashlib.blake2b(os.fsencode(f"{file}\0{offset}\0"), digest_size=16)
    digest.update(content)
    return int.from_bytes(digest.digest(), "big")


def record(content: bytes, *, file: str, document: int, digest: int, cut: bool = False) -> Record:
    """The record of a document's UTF-8 bytes, judged."""
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return Record(file, None, NOT_UTF8, document, digest, cut)
    if not text or text.isspace():
        return Record(file, None, EMPTY, document, digest, cut)
    return Record(file, text, None, document, digest, cut)


def records(content: bytes, limit: int, *, file: str, digest: int) -> Iterator[Record]:
    """The records of a document in memory: one, or several where it is over `limit` bytes."""
    document = hash64(content)
    begin = 0
    for at in range(limit, max(len(content), 1) + limit, limit):
        end = at - before(content[max(at - look_back(limit), 0) : at]) if at < len(content) else len(content)
        cut = begin == 0 and end < len(content)
        yield record(content[begin:end], file=file, document=document, digest=0 if begin else digest, cut=cut)
        begin = end


def look_back(limit: int) -> int:
    """Bytes before a multiple of the limit in which a place to cut is looked for."""
    return min(64 << 10, limit)


def before(window: bytes) -> int:
    """How far before the end of `window` a too long document is cut: at a line's end, else between characters."""
    if line_end := window.rfind(b"\n") + 1:
        return len(window) - line_end
    for back in range(1, min(4, len(window)) + 1):
        if (first := window[-back]) & 0xC0 != 0x80:  # the last character begins here, with this many bytes
            length = 1 if first < 0x80 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4
            return back if back < length else 0
    return 0
