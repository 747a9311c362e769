"""What is in a prepared corpus: counts, lengths of documents, copies, and windows as a run reads them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.corpus import Config
from data.manifest import SPLITS, Manifest, SplitName
from data.megatron import indexed_dataset
from data.tokenizer import FILE_NAME, Bytes, HuggingFace

QUANTILES = {"min": 0.0, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "max": 1.0}
HEAD = 80  # characters of a repeated document that are shown
FIRST, LAST = 5, 3  # lines of a document's piece that people see


@dataclass(frozen=True)
class Inspect:
    """Counts, lengths, exact copies (by a 64-bit hash of the tokens) and a few decoded windows of a prepared corpus."""

    path: str = field(metadata={"help": "folder that `python -m data prepare` wrote"})
    windows: int = field(default=2, metadata={"help": "how many windows to show, evenly spaced through an epoch"})
    split: SplitName = field(default="train", metadata={"help": "of the windows: 'train' or 'valid'"})
    sequence_length: int = field(default=2048, metadata={"help": "tokens a window"})
    seed: int = field(default=0, metadata={"help": "draws the order of the windows, as data.seed does"})
    worst: int = field(default=5, metadata={"help": "how many of the most repeated documents to show"})
    json: bool = field(default=False, metadata={"help": "one JSON object, for scripts"})

    def __post_init__(self) -> None:
        if min(self.windows, self.worst) < 0 or self.sequence_length < 1:
            raise ValueError("windows and worst count from 0 and sequence_length from 1.")


def inspect(request: Inspect) -> str:
    """Raises Refused where the corpus cannot be read whole."""
    folder = Path(request.path)
    manifest = Manifest.read(folder)
    present: list[SplitName] = [split for split in SPLITS if manifest.splits[split].tokens]
    for split in present:
        Config(request.path, split).open()  # refuses what is damaged
    decode = _decoder(folder, manifest)
    files = {split: _Documents(folder / split) for split in present}
    found = {
        "path": str(folder),
        "source": manifest.source,
        "vocab": manifest.vocab,
        "splits": {split: _counts(manifest, split, files.get(split)) for split in SPLITS},
        "skipped": manifest.skipped,
        "cut": manifest.cut,
        "copies": _copies(files, request.worst, decode),
        "windows": _windows(request, decode) if request.split in files else [],
    }
    return json.dumps(found) if request.json else "\n".join(_lines(found))


class _Documents:
    """The token ids of each document of a split."""

    def __init__(self, prefix: Path) -> None:
        index = indexed_dataset().IndexedDataset(str(prefix)).index
        self.lengths: NDArray[np.int64] = index.sequence_lengths.astype(np.int64)
        self._ends = np.cumsum(self.lengths)
        self._tokens = np.memmap(f"{prefix}.bin", dtype=index.dtype, mode="r")

    def __getitem__(self, number: int) -> NDArray[Any]:
        return self._tokens[self._ends[number] - self.lengths[number] : self._ends[number]]

    def hashes(self) -> NDArray[np.uint64]:
        digests = (hashlib.blake2b(self[i].data, digest_size=8).digest() for i in range(len(self.lengths)))
        return np.frombuffer(b"".join(digests), np.uint64)


def _decoder(folder: Path, manifest: Manifest) -> Callable[[list[int]], str]:
    """Ids to text; to the ids themselves where the corpus came without its tokenizer."""
    if (folder / FILE_NAME).is_file():
        return HuggingFace(str(folder / FILE_NAME), None).decode
    if manifest.settings.get("tokenizer") == Bytes.fingerprint:
        return Bytes().decode
    return lambda ids: " ".join(map(str, ids))


def _counts(manifest: Manifest, split: SplitName, documents: _Documents | None) -> dict[str, Any]:
    facts = manifest.splits[split]
    counts: dict[str, Any] = {"documents": facts.documents, "tokens": facts.tokens, "bytes": facts.bytes}
    if documents is not None:
        lengths = np.quantile(documents.lengths, list(QUANTILES.values()), method="inverted_cdf")
        counts["bytes_per_token"] = facts.bytes / facts.tokens
        counts["tokens_per_document"] = {"mean": facts.tokens / facts.documents} | dict(
            zip(QUANTILES, map(int, lengths), strict=True)
        )
    return counts


def _copies(files: dict[SplitName, _Documents], worst: int, decode: Callable[[list[int]], str]) -> dict[str, Any]:
    """copies, tokens: of documents that repeat an earlier one; shared: held-out documents that are trained on too."""
    hashes = {split: documents.hashes() for split, documents in files.items()}
    lengths = np.concatenate([documents.lengths for documents in files.values()] or [np.empty(0, np.int64)])
    every = np.concatenate(list(hashes.values()) or [np.empty(0, np.uint64)])
    _, first, counts = np.unique(every, return_index=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:worst]
    shown = [
        {"times": int(counts[i]), "tokens": int(lengths[first[i]]), "begins": _head(files, int(first[i]), decode)}
        for i in order
        if counts[i] > 1
    ]
    shared = int(np.isin(hashes["valid"], hashes["train"]).sum()) if len(hashes) == 2 else 0
    return {
        "documents": len(every) - len(first),
        "tokens": int(lengths.sum() - lengths[first].sum()),
        "shared": shared,
        "worst": shown,
    }


def _head(files: dict[SplitName, _Documents], number: int, decode: Callable[[list[int]], str]) -> str:
    """How document `number`, counted through both splits, begins."""
    for documents in files.values():
        if number < len(documents.lengths):
            return decode(documents[number][:HEAD].tolist())[:HEAD]
        number -= len(documents.lengths)
    raise IndexError(number)


def _windows(request: Inspect, decode: Callable[[list[int]], str]) -> list[dict[str, Any]]:
    if request.windows == 0:
        return []
    source = Config(request.path, request.split).open()
    windows = []
    in_epoch = max(source.num_tokens // request.sequence_length, request.windows)
    for index in range(0, in_epoch, in_epoch // request.windows)[: request.windows]:
        window = source.window(index, request.sequence_length, 0, request.seed)
        pieces = [
            {"begin": begin, "tokens": end - begin, "text": decode(window.tokens[begin:end].tolist())}
            for begin, end in pairwise([*window.starts.tolist(), len(window.tokens)])
        ]
        windows.append({"index": index, "pieces": pieces})
    return windows


def _lines(found: dict[str, Any]) -> Iterator[str]:
    yield f"{found['path']}: {found['source']}, {found['vocab']:,} ids"
    for split, counts in found["splits"].items():
        yield f"{split}: {counts['documents']:,} documents, {counts['tokens']:,} tokens, {counts['bytes']:,} bytes" + (
            f", {counts['bytes_per_token']:.2f} bytes a token" if counts["tokens"] else ""
        )
        if counts["tokens"]:
            lengths = counts["tokens_per_document"].items()
            yield "  tokens a document: " + ", ".join(f"{name} {value:,.0f}" for name, value in lengths)
    for rule, count in found["skipped"].items():
        yield f"left out: {count:,} ({rule})"
    if found["cut"]:
        yield f"cut into several: {found['cut']:,} (longer than max_document)"
    copies = found["copies"]
    yield (
        f"copies of an earlier document: {copies['documents']:,} of {copies['tokens']:,} tokens; "
        f"held out and trained on too: {copies['shared']:,}"
    )
    for one in copies["worst"]:
        yield f"  {one['times']:,} times, {one['tokens']:,} tokens: {_printable(one['begins'])!r}"
    for window in found["windows"]:
        yield ""
        yield f"window {window['index']}"
        for piece in window["pieces"]:
            yield f"  ── a document from token {piece['begin']}, {piece['tokens']} tokens ──"
            lines = _printable(piece["text"]).split("\n")
            if (between := len(lines) - FIRST - LAST) > 1:
                lines[FIRST : FIRST + between] = [f"… {between} lines …"]
            yield from (f"  │ {line}" for line in lines)


def _printable(text: str) -> str:
    """Without what a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
