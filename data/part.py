"""A stretch of a source to its parts, made by one worker process: read, tokenize, write aside, rename.

A part is closed once it holds so much text, or so many documents, that memory does not grow with the source; the last
one of a stretch says that it is. A worker that starts anew goes on behind the parts that are there.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data import workers
from data.records import STRETCH, Stretch
from data.split import HeldOut
from data.tokenizer import Tokenizer, open_tokenizer

SPLITS = ("train", "valid")
FORMAT = 2  # of a part's file; another one makes parts anew
BATCH = 256 << 10  # characters handed to the tokenizer at once: it takes hundreds of bytes a token
DOCUMENT = 256  # bytes that a document takes beside its text: arrays and list entries
CUT = "cut"  # the counter of documents that became several


@dataclass(frozen=True)
class Job:
    """What a worker needs to make the parts of one stretch. path: of the parts, without their numbers."""

    stretch: Stretch
    path: Path
    tokenizer: str
    end_of_document: str | None
    held_out: HeldOut


@dataclass(frozen=True)
class Part:
    """A part as read back.

    tokens:  of all documents of a split, joined; lengths: tokens of each, its end included; bytes: of their text.
    skipped: documents left out, by rule; cut: documents that became several.
    records: that were read for it; is_last: whether the stretch ends with it.
    """

    tokens: dict[str, NDArray[Any]]
    lengths: dict[str, NDArray[np.int32]]
    bytes: dict[str, int]
    skipped: Counter[str]
    cut: int
    source_digest: int
    records: int
    is_last: bool

    @staticmethod
    def read(path: Path) -> Part:
        with np.load(path) as stored:
            facts = json.loads(stored["facts"].tobytes())
            return Part(
                tokens={split: stored[f"{split}_tokens"] for split in SPLITS},
                lengths={split: stored[f"{split}_lengths"] for split in SPLITS},
                skipped=Counter(facts.pop("skipped")),
                **facts,
            )

    def write(self, path: Path) -> None:
        """Aside, flushed, then renamed: a part that is there is whole."""
        names = ("bytes", "skipped", "cut", "source_digest", "records", "is_last")
        facts = json.dumps({name: getattr(self, name) for name in names})
        arrays: dict[str, NDArray[Any]] = {"facts": np.frombuffer(facts.encode(), dtype=np.uint8)}
        for split in SPLITS:
            arrays[f"{split}_tokens"], arrays[f"{split}_lengths"] = self.tokens[split], self.lengths[split]
        aside = path.with_suffix(f".{os.getpid()}.tmp")
        with aside.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)


def token_type(vocab: int) -> type[np.uint16] | type[np.int32]:
    """The narrowest type that Megatron's readers expect for this vocabulary."""
    return np.uint16 if vocab < 65500 else np.int32


def make_parts(job: Job) -> list[Path]:
    """The parts of the job's stretch, in order; those that are there are left as they are."""
    paths: list[Path] = []
    already = 0
    for number in count():
        path = job.path.with_name(f"{job.path.name}.{number:05d}.npz")
        if not path.exists():
            break
        paths.append(path)
        part = Part.read(path)
        workers.progress(sum(part.bytes.values()))
        already += part.records
        if part.is_last:
            return paths
    tokenizer = open_tokenizer(job.tokenizer, job.end_of_document)
    maker = _Maker(tokenizer)
    for number, record in enumerate(job.stretch.records()):
        if number < already:
            continue
        if maker.filled >= STRETCH:
            paths.append(_write(maker, job, len(paths), is_last=False))
            maker = _Maker(tokenizer)
        maker.source_digest += record.digest
        maker.records += 1
        maker.cut += record.cut
        if record.text is not None:
            maker.add(job.held_out.split(record), record.text)
        elif record.skipped is not None:
            maker.skipped[record.skipped] += 1
    return [*paths, _write(maker, job, len(paths), is_last=True)]


def _write(maker: _Maker, job: Job, number: int, is_last: bool) -> Path:
    path = job.path.with_name(f"{job.path.name}.{number:05d}.npz")
    maker.close(is_last).write(path)
    return path


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

    def close(self, is_last: bool) -> Part:
        self._encode()
        return Part(
            tokens={split: np.concatenate(self._tokens[split]) for split in SPLITS},
            lengths={split: np.array(self._lengths[split], np.int32) for split in SPLITS},
            bytes=self._bytes,
            skipped=self.skipped,
            cut=self.cut,
            source_digest=self.source_digest % 2**128,
            records=self.records,
            is_last=is_last,
        )

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
