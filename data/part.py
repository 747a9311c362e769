"""One part of a corpus, made by one worker process: read, tokenize, write aside, rename."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.split import HeldOut
from data.text import Digest, Piece, read_documents
from data.tokenizer import Tokenizer, open_tokenizer

SPLITS = ("train", "valid")
FORMAT = 1  # of a part's file; another one makes parts anew
BATCH = 1 << 20  # characters handed to the tokenizer at once


@dataclass(frozen=True)
class Job:
    """What a worker needs to make one part."""

    pieces: list[Piece]
    path: Path
    tokenizer: str
    end_of_document: str | None
    text_key: str
    held_out: HeldOut


@dataclass(frozen=True)
class Part:
    """A part as read back. tokens: of all documents of a split, joined; lengths: tokens of each, its end included."""

    tokens: dict[str, NDArray[Any]]
    lengths: dict[str, NDArray[np.int32]]
    bytes: dict[str, int]
    skipped: Counter[str]
    source_digest: int

    @staticmethod
    def read(path: Path) -> Part:
        with np.load(path) as stored:
            facts = json.loads(stored["facts"].tobytes())
            return Part(
                tokens={split: stored[f"{split}_tokens"] for split in SPLITS},
                lengths={split: stored[f"{split}_lengths"] for split in SPLITS},
                bytes=facts["bytes"],
                skipped=Counter(facts["skipped"]),
                source_digest=facts["source_digest"],
            )


def token_type(vocab: int) -> type[np.uint16] | type[np.int32]:
    """The narrowest type that Megatron's readers expect for this vocabulary."""
    return np.uint16 if vocab < 65500 else np.int32


def make_part(job: Job) -> Path:
    """Write the part of `job` unless it is there. A part that is there is whole: it was renamed into place."""
    if job.path.exists():
        return job.path
    tokenizer = open_tokenizer(job.tokenizer, job.end_of_document)
    skipped: Counter[str] = Counter()
    digest = Digest()
    texts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for piece in job.pieces:
        for offset, text in read_documents(piece, job.text_key, skipped, digest):
            texts[job.held_out.split(piece.name, offset)].append(text)
    arrays: dict[str, NDArray[Any]] = {}
    for split in SPLITS:
        arrays[f"{split}_tokens"], arrays[f"{split}_lengths"] = _encode(tokenizer, texts[split])
    facts = {
        "bytes": {split: sum(len(text.encode()) for text in texts[split]) for split in SPLITS},
        "skipped": skipped,
        "source_digest": digest.total,
    }
    arrays["facts"] = np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8)
    aside = job.path.with_suffix(f".{os.getpid()}.tmp")
    with aside.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    aside.rename(job.path)
    return job.path


def _encode(tokenizer: Tokenizer, texts: list[str]) -> tuple[NDArray[Any], NDArray[np.int32]]:
    """Tokens of all texts joined, each ended; and the length of each."""
    kind = token_type(tokenizer.vocab)
    end = np.array([tokenizer.end_of_document], dtype=kind)
    joined: list[NDArray[Any]] = [np.empty(0, kind)]
    lengths: list[int] = []
    for batch in _batches(texts):
        for ids in tokenizer.encode(batch):
            joined += [ids.astype(kind), end]
            lengths.append(len(ids) + 1)
    return np.concatenate(joined), np.array(lengths, dtype=np.int32)


def _batches(texts: list[str]) -> list[list[str]]:
    batches: list[list[str]] = []
    filled = BATCH
    for text in texts:
        if filled >= BATCH:
            batches.append([])
            filled = 0
        batches[-1].append(text)
        filled += len(text)
    return batches
