"""Text to a corpus that this package, and Megatron, can read.

The work is cut into parts that depend on the files alone; worker processes make the parts in `OUT.preparing`, each
written aside and renamed; the parts are joined in order and the finished folder is renamed to `OUT` in one act. So a
run that is killed goes on where it was, the bytes do not depend on the number of processes or on interruptions, and
`OUT` is either whole or not there.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from conf.schema import Refused
from data import manifest as manifests
from data.manifest import Manifest, Split, sha256
from data.megatron import indexed_dataset
from data.part import SPLITS, Job, Part, make_part, token_type
from data.split import By, HeldOut
from data.text import cut, describe, list_files, listing
from data.tokenizer import Tokenizer, open_tokenizer
from data.workers import start_worker, usable_cores

WHOLE = "whole"  # the corpus while it is being joined


@dataclass(frozen=True)
class Prepare:
    """Text files or JSONL to OUT/train.bin, .idx, OUT/valid.bin, .idx and OUT/manifest.json."""

    source: str = field(
        metadata={"help": "'stdlib' (this Python's own standard library), a file, a folder or a glob; *.jsonl is JSONL"}
    )
    out: str = field(metadata={"help": "folder to make"})
    tokenizer: str = field(default="bytes", metadata={"help": "'bytes', or a Hugging Face tokenizer.json"})
    end_of_document: str | None = field(
        default=None, metadata={"help": "token that ends a document, with a Hugging Face tokenizer"}
    )
    text_key: str = field(default="text", metadata={"help": "key of the text in a JSONL line"})
    held_out: float = field(default=0.05, metadata={"help": "share that goes to the held-out split"})
    held_out_by: By = field(default="file", metadata={"help": "what is held out whole: 'file' or 'document'"})
    processes: int = field(default_factory=usable_cores, metadata={"help": "worker processes"})

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}, but a share from 0 to below 1 is needed.")
        if self.processes < 1:
            raise ValueError(f"processes is {self.processes}, but at least 1 is needed.")


def prepare(request: Prepare) -> str:
    """Make the corpus and return a sentence that says what there is now. A corpus already made this way is left alone.

    Raises Refused where the input cannot be used or OUT holds something else, OSError where the disk fails.
    """
    out = Path(request.out)
    tokenizer = open_tokenizer(request.tokenizer, request.end_of_document)
    tokenizer.end_of_document  # noqa: B018  refuses here, before anything is written
    if Path(request.source).is_dir() and out.resolve().is_relative_to(Path(request.source).resolve()):
        raise Refused(f"out {out} lies inside the source {request.source} and would become part of it; choose another.")
    files = list_files(request.source)
    settings = _settings(request, tokenizer, listing(files))
    if out.exists() and not _is_empty_folder(out):
        return _already_there(out, settings)
    held_out = HeldOut.choose(request.held_out, request.held_out_by, [file.name for file in files])
    with _workplace(out) as work:
        if out.exists() and not _is_empty_folder(out):  # finished by another process since
            return _already_there(out, settings)
        folder = _parts_folder(work, settings | {"modified": [file.modified for file in files]})
        jobs = [
            Job(pieces, folder / f"{i:06d}.npz", request.tokenizer, request.end_of_document, request.text_key, held_out)
            for i, pieces in enumerate(cut(files))
        ]
        whole = work / WHOLE
        with closing(_make_parts(jobs, request.processes)) as parts:
            made = _join(parts, whole, tokenizer, settings, describe(request.source))
        if made.splits["train"].documents == 0:
            raise Refused(f"{request.source} holds no document to train on: {_counts(made)}.")
        os.rename(whole, out)
    return f"{out}: {_counts(made)}."


def _settings(request: Prepare, tokenizer: Tokenizer, files: str) -> dict[str, Any]:
    """What decides the bytes of the corpus; the source and the tokenizer by content, not by path."""
    return {
        "files": files,
        "tokenizer": tokenizer.fingerprint,
        "end_of_document": tokenizer.end_of_document,
        "text_key": request.text_key,
        "held_out": request.held_out,
        "held_out_by": request.held_out_by,
    }


def _already_there(out: Path, settings: dict[str, Any]) -> str:
    found = Manifest.read(out) if (out / manifests.NAME).exists() else None
    if found is None:
        raise Refused(f"{out} exists and is not a prepared corpus; choose another out or remove it.")
    differing = [key for key in settings if found.settings.get(key) != settings[key]]
    if differing:
        raise Refused(f"{out} was prepared with other {', '.join(differing)}; choose another out or remove it.")
    shutil.rmtree(_work_folder(out), ignore_errors=True)  # of a process killed just before it did this
    return f"{out} is already prepared: {_counts(found)}."


def _work_folder(out: Path) -> Path:
    return out.with_name(f"{out.name}.preparing")


@contextmanager
def _workplace(out: Path) -> Iterator[Path]:
    """The folder beside `out` in which parts are kept until all is done; one process at a time.

    It is removed when the work is done or its input refused, and kept when the work is cut short.
    """
    work = _work_folder(out)
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused(f"another process is preparing {out}; wait for it, or choose another out.") from None
        try:
            yield work
        except Refused:
            shutil.rmtree(work)
            raise
        except BaseException as error:
            error.add_note(f"Finished parts are kept in {work}; the same command goes on from there.")
            raise
        shutil.rmtree(work)


def _parts_folder(work: Path, plan: dict[str, Any]) -> Path:
    """Where the parts of this plan are: those that an interrupted run made are used again.

    A plan has a folder of its own, so that a worker which outlives its killed parent for a moment cannot leave a part
    of another plan here.
    """
    folder = work / hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]
    stale = [path for path in work.iterdir() if path.is_dir() and path != folder and path.name != WHOLE]
    if stale:
        print(f"the settings or files changed since the parts in {work} were made; starting anew.", file=sys.stderr)
    for path in stale:
        shutil.rmtree(path)
    folder.mkdir(exist_ok=True)
    for path in folder.glob("*.tmp"):
        path.unlink()
    if made := len(list(folder.glob("*.npz"))):
        print(f"going on from {made} finished parts in {work}.", file=sys.stderr)
    return folder


def _make_parts(jobs: list[Job], processes: int) -> Generator[Path]:
    """The parts in order, made by worker processes while the caller uses those before."""
    bar = tqdm(total=sum(map(_size, jobs)), unit="B", unit_scale=True, desc="prepare", disable=None)
    # Spawned, not forked: a fork of a process with threads may hang.
    pool = ProcessPoolExecutor(min(processes, len(jobs)), get_context("spawn"), start_worker, (os.getpid(),))
    try:
        futures = [pool.submit(make_part, job) for job in jobs]
        for job, future in zip(jobs, futures, strict=True):
            yield future.result()
            bar.update(_size(job))
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()


def _size(job: Job) -> int:
    return sum(piece.end - piece.begin for piece in job.pieces)


def _join(parts: Iterator[Path], whole: Path, tokenizer: Tokenizer, settings: dict[str, Any], source: str) -> Manifest:
    """Write the token files and the manifest into `whole` and flush them to disk."""
    if whole.exists():
        shutil.rmtree(whole)
    whole.mkdir()
    first = next(parts)  # the workers are busy while megatron-core is imported
    builder = indexed_dataset().IndexedDatasetBuilder
    kind = token_type(tokenizer.vocab)
    builders = {split: builder(str(whole / f"{split}.bin"), dtype=kind) for split in SPLITS}
    frequencies = {split: np.zeros(tokenizer.vocab, np.int64) for split in SPLITS}
    counts = {split: Counter[str]() for split in SPLITS}
    skipped: Counter[str] = Counter()
    source_digest = hashlib.sha256()
    for path in _chain(first, parts):
        part = Part.read(path)
        skipped += part.skipped
        source_digest.update(part.source_sha256.encode())
        for split in SPLITS:
            tokens, lengths = part.tokens[split], part.lengths[split]
            for document, length in zip(np.split(tokens, np.cumsum(lengths)[:-1]), lengths.tolist(), strict=False):
                builders[split].add_document(document, [length])
            frequencies[split] += np.bincount(tokens, minlength=tokenizer.vocab)
            counts[split].update(documents=len(lengths), bytes=part.bytes[split])
    splits = {}
    for split in SPLITS:
        builders[split].finalize(str(whole / f"{split}.idx"))
        splits[split] = _facts(whole, split, counts[split], frequencies[split])
    made = Manifest(
        source=source,
        source_sha256=source_digest.hexdigest(),
        settings=settings,
        vocab=tokenizer.vocab,
        end_of_document=tokenizer.end_of_document,
        splits=splits,
        skipped=dict(sorted(skipped.items())),
    )
    made.write(whole)
    for file in whole.iterdir():
        _flush(file)
    return made


def _chain(first: Path, rest: Iterator[Path]) -> Iterator[Path]:
    yield first
    yield from rest


def _facts(whole: Path, split: str, counts: Counter[str], frequencies: NDArray[np.int64]) -> Split:
    bin_path, idx_path = whole / f"{split}.bin", whole / f"{split}.idx"
    tokens = int(frequencies.sum())
    shares = frequencies[frequencies > 0] / max(tokens, 1)
    return Split(
        documents=counts["documents"],
        tokens=tokens,
        bytes=counts["bytes"],
        unigram_entropy=float(-(shares * np.log(shares)).sum()) + 0.0,
        bin_bytes=bin_path.stat().st_size,
        idx_bytes=idx_path.stat().st_size,
        sha256=sha256(bin_path, idx_path),
    )


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _counts(made: Manifest) -> str:
    train, valid = (made.splits[split] for split in SPLITS)
    skipped = "; ".join(f"{count} skipped ({rule})" for rule, count in made.skipped.items()) or "none skipped"
    return (
        f"{train.documents:,} documents of {train.tokens:,} tokens to train on, "
        f"{valid.documents:,} of {valid.tokens:,} held out, {skipped}"
    )
