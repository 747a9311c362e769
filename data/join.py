"""Parts to one corpus: megatron-core's token files and the manifest, flushed to disk."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.manifest import Manifest, Split, sha256
from data.megatron import indexed_dataset
from data.part import SPLITS, Part, token_type
from data.tokenizer import Tokenizer


def join(parts: Iterator[Path], whole: Path, tokenizer: Tokenizer, settings: dict[str, Any], source: str) -> Manifest:
    """Write the parts, in order, and their manifest into the new folder `whole`."""
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
    source_digest = 0
    for path in chain([first], parts):
        part = Part.read(path)
        skipped += part.skipped
        source_digest += part.source_digest
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
        source_digest=f"{source_digest % 2**128:032x}",
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
