"""Text to a corpus that this package, and Megatron, can read.

The work is cut into portions that depend on the source alone; worker processes make their parts in `OUT.preparing`,
each written aside and renamed; the parts are joined in order and the finished folder is renamed to `OUT` in one act. So
a run that is killed goes on where it was, the bytes do not depend on the number of processes or on interruptions, and
`OUT` is either whole or not there.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from conf.schema import Refused
from data import manifest as manifests
from data.join import join
from data.manifest import Manifest
from data.part import FORMAT, SPLITS, Job, make_parts
from data.records import Texts
from data.split import By, HeldOut
from data.texts import DATASETS, TextSource
from data.tokenizer import Tokenizer, open_tokenizer
from data.workers import KILLED, held_up, start_worker, usable_cores, worker_context

WHOLE = "whole"  # the corpus while it is being joined


@dataclass(frozen=True)
class Prepare(TextSource):
    """Text to OUT/train.bin, .idx, OUT/valid.bin, .idx, OUT/manifest.json and the tokenizer.

    What is left out or cut is counted in the manifest by rule: malformed lines, invalid UTF-8, empty documents.
    """

    out: str = field(metadata={"help": "folder to make"})
    tokenizer: str = field(default="bytes", metadata={"help": "'bytes', or a Hugging Face tokenizer.json"})
    end_of_document: str | None = field(
        default=None, metadata={"help": "token that ends a document, with a Hugging Face tokenizer"}
    )
    held_out: float = field(default=0.05, metadata={"help": "share that goes to the held-out split"})
    held_out_by: By | None = field(
        default=None,
        metadata={
            "help": "what is held out whole: 'file', or 'document' with its copies; null: 'file' where each file is one"
        },
    )
    processes: int = field(default_factory=usable_cores, metadata={"help": "worker processes"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}, but a share from 0 to below 1 is needed.")
        if self.processes < 1:
            raise ValueError(f"processes is {self.processes}, but at least 1 is needed.")


def prepare(request: Prepare) -> str:
    """Make the corpus and return a sentence that says what there is now. A corpus already made this way is left alone.

    Raises Refused where the input cannot be used or OUT holds something else, OSError where the disk fails.
    """
    out = Path(request.out)
    _check_place(out, Path(request.source.removeprefix(DATASETS)))
    tokenizer = open_tokenizer(request.tokenizer, request.end_of_document)
    texts = request.open()
    by = _held_out_by(request, texts)
    settings = _settings(request, tokenizer, texts.fingerprint, by)
    if _is_taken(out):
        return _already_there(out, settings)
    with _workplace(out) as work:
        if _is_taken(out):  # by another process, a moment ago
            return _already_there(out, settings)
        folder = _parts_folder(work, [FORMAT, settings, texts.plan])
        held_out = HeldOut.choose(request.held_out, by, texts.names())
        jobs = (
            Job(portion, folder / f"{i:06d}", request.tokenizer, request.end_of_document, held_out)
            for i, portion in enumerate(texts.portions())
        )
        modules = ["data.part", "tokenizers", type(next(texts.portions())).__module__]
        whole = work / WHOLE
        with closing(make_all_parts(jobs, modules, request.processes, texts.size)) as parts:
            made = join(parts, whole, tokenizer, settings, texts.name)
        texts.check_unchanged()
        if made.splits["train"].documents == 0:
            raise Refused(f"{request.source} holds no document to train on: {_counts(made)}.")
        os.rename(whole, out.resolve())
    return f"{out}: {_counts(made)}."


def _held_out_by(request: Prepare, texts: Texts) -> By:
    if request.held_out_by == "file" and next(texts.names(), None) is None:
        raise Refused(f"held_out_by is 'file', but {request.source} has no file to hold out; leave it out.")
    return request.held_out_by or ("document" if texts.many else "file")


def _check_place(out: Path, source: Path) -> None:
    if os.path.isdir(source) and out.resolve().is_relative_to(source.resolve()):
        raise Refused(f"out {out} lies inside the source {source} and would become part of it; choose another.")
    for above in out.parents:
        if above.exists() and not above.is_dir():
            raise Refused(f"{above} is not a folder, so {out} cannot be made in it; choose another out.")


def _settings(request: Prepare, tokenizer: Tokenizer, files: str, by: By) -> dict[str, Any]:
    """What decides the bytes of the corpus; the source and the tokenizer by content, not by path."""
    return {
        "files": files,
        "tokenizer": tokenizer.fingerprint,
        "end_of_document": tokenizer.end_of_document,
        "text_key": request.text_key,
        "held_out": request.held_out,
        "held_out_by": by,
        "max_document": request.max_document,
        "rows": request.rows,
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
    """Beside `out`, or beside what it links to: a folder is renamed within a disk, and not onto a link."""
    place = out.resolve()
    return place.with_name(f"{place.name}.preparing")


@contextmanager
def _workplace(out: Path) -> Iterator[Path]:
    """The folder beside `out` in which parts are kept until all is done; one process at a time.

    It is removed when the work is done or its input refused, and kept when the work is cut short.
    """
    work = _work_folder(out)
    new_folders = [path for path in work.parents if not path.exists()]
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = (work / "lock").open("w")
    except OSError as error:
        raise Refused(f"{work} cannot be written ({error.strerror}); choose another out.") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused(f"another process is preparing {out}; wait for it, or choose another out.") from None
        try:
            yield work
        except Refused:
            shutil.rmtree(work)
            for folder in new_folders:
                with suppress(OSError):  # somebody has put something there
                    folder.rmdir()
            raise
        except BaseException as error:
            error.add_note(f"Finished parts are kept in {work}; the same command goes on from there.")
            raise
        shutil.rmtree(work, ignore_errors=True)  # out is there; a rest of this is swept away by the next run


def _parts_folder(work: Path, plan: list[Any]) -> Path:
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


def make_all_parts(jobs: Iterator[Job], modules: list[str], processes: int, size: int | None) -> Generator[Path]:
    """The parts in order, made by worker processes while the caller uses those before.

    No more jobs are taken than keep the workers busy: a source may be cut into any number. modules: that workers need.
    """
    context = worker_context(modules)
    done, stop = context.Value("q", 0), context.RawValue("b", 0)
    bar = tqdm(total=size, unit="B", unit_scale=True, desc="prepare", disable=None)
    pool = ProcessPoolExecutor(processes, context, start_worker, (done, stop))  # starts no more than it has jobs for
    in_order: deque[Future[list[Path]]] = deque()
    busy: set[Future[list[Path]]] = set()
    try:
        while True:
            with held_up():
                for job in islice(jobs, 2 * processes - len(busy)):
                    in_order.append(pool.submit(make_parts, job))
                    busy.add(in_order[-1])
            bar.update(done.value - bar.n)
            if not in_order:
                return
            if in_order[0].done():
                yield from in_order.popleft().result()
            else:
                wait(busy, timeout=0.5, return_when=FIRST_COMPLETED)
            busy = {future for future in busy if not future.done()}
    except BrokenProcessPool:
        raise RuntimeError(KILLED) from None
    finally:
        stop.value = 1  # an error or an interruption waits for no more than the records in hand
        pool.shutdown(cancel_futures=True)
        bar.close()


def _is_taken(out: Path) -> bool:
    """Whether there is something other than an empty folder."""
    return os.path.exists(out) and not (out.is_dir() and not any(out.iterdir()))


def _counts(made: Manifest) -> str:
    train, valid = (made.splits[split] for split in SPLITS)
    skipped = "; ".join(f"{count} skipped ({rule})" for rule, count in made.skipped.items()) or "none skipped"
    cut = f"; {made.cut} cut (longer than {made.settings['max_document']:,} bytes)" if made.cut else ""
    return (
        f"{train.documents:,} documents of {train.tokens:,} tokens to train on, "
        f"{valid.documents:,} of {valid.tokens:,} held out, {skipped}{cut}"
    )
