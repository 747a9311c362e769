"""A portion of a source to its parts, made by one worker process: read, tokenize, write aside, rename.

A part is closed once it holds so much text, or so many documents, that memory does not grow with the source; the last
one of a portion says that it is. A worker that starts anew goes on behind the parts that are there.
"""

from __future__ import annotations

import json
import os
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data import workers
from data.records import PORTION, Portion
from data.split import HeldOut
from data.tokenizer import Tokenizer, open_tokenizer

SPLITS = ("train", "valid")
FORMAT = 2  # of a part's file; another one makes parts anew
BATCH = 256 << 10  # characters handed to the tokenizer at once: it takes hundreds of bytes a token
DOCUMENT = 256  # bytes that a document takes beside its text: arrays and list entries
BLOCK = 512 << 10  # bytes of a part that are read back at once


@dataclass(frozen=True)
class Job:
    """What a worker needs to make the parts of one portion. path: of the parts, without their numbers."""

    portion: Portion
    path: Path
    tokenizer: str
    end_of_document: str | None
    held_out: HeldOut

    def part(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number:05d}.npz")


@dataclass(frozen=True)
class Part:
    """What a part says of itself. Beside it its file holds, of each split, the tokens and the length of each document.

    bytes:   of the text of each split.
    skipped: documents left out, by rule; cut: documents that became several.
    records: that were read for it; is_last: whether the portion ends with it.
    """

    bytes: dict[str, int]
    skipped: Counter[str]
    cut: int
    source_digest: int
    records: int
    is_last: bool

    @staticmethod
    def read(path: Path) -> Part:
        """Raises zipfile.BadZipFile where a byte of the file is another than was written."""
        with zipfile.ZipFile(path) as stored:
            if stored.testzip() is not None:
                raise zipfile.BadZipFile(f"{path} is damaged")
        facts = json.loads(b"".join(block.tobytes() for block in blocks(path, "facts")))
        return Part(skipped=Counter(facts.pop("skipped")), **facts)

    def write(self, path: Path, tokens: dict[str, NDArray[Any]], lengths: dict[str, NDArray[np.int32]]) -> None:
        """Aside, flushed, then renamed: a part that is there is whole.

        tokens: of all documents of a split, joined; lengths: tokens of each, its end included.
        """
        facts = np.frombuffer(json.dumps(vars(self)).encode(), np.uint8)
        arrays = {
            f"{split}_{name}": by[split] for name, by in (("tokens", tokens), ("lengths", lengths)) for split in by
        }
        aside = path.with_suffix(f".{os.getpid()}.tmp")
        with aside.open("wb") as file:
            np.savez(file, facts=facts, **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)


def blocks(path: Path, name: str) -> Iterator[NDArray[Any]]:
    """An array of a part's file, SPLIT_tokens or SPLIT_lengths, a block at a time: whole, it is megabytes."""
    with zipfile.ZipFile(path) as stored, stored.open(f"{name}.npy") as file:
        np.lib.format.read_magic(file)
        kind = np.lib.format.read_array_header_1_0(file)[2]
        while block := file.read(BLOCK):
            yield np.frombuffer(block, kind)


def token_type(vocab: int) -> type[np.uint16] | type[np.int32]:
    """The narrowest type that Megatron's readers expect for this vocabulary."""
    return np.uint16 if vocab < 65500 else np.int32


def make_parts(job: Job) -> list[Path]:
    """The parts of the job's portion, in order; those that are there and whole are left as they are.

    Raises workers.Stopped once the parent has given up.
    """
    paths: list[Path] = []
    already = 0
    for number in count():
        path = job.part(number)
        if not path.exists():
            break
        try:
            part = Part.read(path)
        except zipfile.BadZipFile:
            print(f"{path} is damaged and made anew.", file=sys.stderr)
            break
        paths.append(path)
        workers.progress(sum(part.bytes.values()))
        already += part.records
        if part.is_last:
            return paths
    tokenizer = open_tokenizer(job.tokenizer, job.end_of_document)
    maker = _Maker(tokenizer)
    for number, record in enumerate(job.portion.records()):
        workers.heed_stop()
        if number < already:
            continue
        if maker.filled >= PORTION:
            paths.append(maker.write(job.part(len(paths)), is_last=False))
            maker = _Maker(tokenizer)
        maker.source_digest += record.digest
        maker.records += 1
        maker.cut += record.cut
        if record.text is not None:
            maker.add(job.held_out.split(record), record.text)
        elif record.skipped is not None:
            maker.skipped[record.skipped] += 1
    return [*paths, maker.write(job.part(len(paths)), is_last=True)]


class _Maker:
    """A part in the making."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._kind = token_type(tokenizer.vocab)
        self._end = np.array([tokenizer.end_of_document], dtype=self._kind)
        self._waiting: dict[str, list[str]] = {split: [] for split in SPLITS}
        self._in_wait = 0
        self._tokens: dict[str, list[NDArray[Any]]] = {split: [np.empty(0, self._kind)] for split in SPLITS}
        self._lengths: dict[str, list[int]] = {split: [] for split in SPLITS}
        self._bytes = dict.fromkeys(SPLITS, 0)
        self.skipped: Counter[str] = Counter()
        self.filled = self.cut = self.source_digest = self.records = 0

    def add(self, split: str, text: str) -> None:
        self._waiting[split].append(text)
        self._in_wait += len(text) + DOCUMENT
        if self._in_wait >= BATCH:
            self._encode()

    def write(self, path: Path, is_last: bool) -> Path:
        self._encode()
        part = Part(
            bytes=self._bytes,
            skipped=self.skipped,
            cut=self.cut,
            source_digest=self.source_digest % 2**128,
            records=self.records,
            is_last=is_last,
        )
        tokens = {split: np.concatenate(self._tokens[split]) for split in SPLITS}
        part.write(path, tokens, {split: np.array(self._lengths[split], np.int32) for split in SPLITS})
        return path

    def _encode(self) -> None:
        for split, texts in self._waiting.items():
            for ids in self._tokenizer.encode(texts):
                self._tokens[split] += [ids.astype(self._kind), self._end]
                self._lengths[split].append(len(ids) + 1)
            read = sum(len(text.encode()) for text in texts)
            self._bytes[split] += read
            self.filled += read + DOCUMENT * len(texts)
            workers.progress(read)
            texts.clear()
        self._in_wait = 0
