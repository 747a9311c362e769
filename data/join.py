"""Parts to one corpus: Megatron's token files, the tokenizer and the manifest, flushed to disk."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.manifest import Manifest, Split, sha256
from data.part import SPLITS, Part, blocks, token_type
from data.tokenfile import TokenFile
from data.tokenizer import FILE_NAME, Tokenizer


def join(parts: Iterable[Path], whole: Path, tokenizer: Tokenizer, settings: dict[str, Any], source: str) -> Manifest:
    """Write the parts, in order, and their manifest into the new folder `whole`."""
    if whole.exists():
        shutil.rmtree(whole)
    whole.mkdir()
    kind = token_type(tokenizer.vocab)
    files = {split: TokenFile(whole / split, kind) for split in SPLITS}
    frequencies = {split: np.zeros(tokenizer.vocab, np.int64) for split in SPLITS}
    num_bytes: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    source_digest = cut = 0
    for path in parts:
        part = Part.read(path)
        skipped += part.skipped
        cut += part.cut
        source_digest += part.source_digest
        num_bytes.update(part.bytes)
        for split in SPLITS:
            for tokens in blocks(path, f"{split}_tokens"):
                files[split].add_tokens(tokens)
                frequencies[split] += np.bincount(tokens, minlength=tokenizer.vocab)
            for lengths in blocks(path, f"{split}_lengths"):
                files[split].add_lengths(lengths)
    splits = {}
    for split in SPLITS:
        files[split].close()
        splits[split] = _facts(whole, split, files[split].documents, num_bytes[split], frequencies[split])
    made = Manifest(
        source=source,
        source_digest=f"{source_digest % 2**128:032x}",
        settings=settings,
        vocab=tokenizer.vocab,
        end_of_document=tokenizer.end_of_document,
        splits=splits,
        skipped=dict(sorted(skipped.items())),
        cut=cut,
    )
    if tokenizer.file is not None:  # so that the corpus can be read back wherever it goes
        shutil.copyfile(tokenizer.file, whole / FILE_NAME)
        if sha256(whole / FILE_NAME) != tokenizer.fingerprint:
            raise OSError(f"{tokenizer.file} changed while text was encoded with it")
    made.write(whole)
    for file in whole.iterdir():
        _flush(file)
    return made


def _facts(whole: Path, split: str, documents: int, num_bytes: int, frequencies: NDArray[np.int64]) -> Split:
    bin_path, idx_path = whole / f"{split}.bin", whole / f"{split}.idx"
    tokens = int(frequencies.sum())
    shares = frequencies[frequencies > 0] / max(tokens, 1)
    return Split(
        documents=documents,
        tokens=tokens,
        bytes=num_bytes,
        unigram_entropy=float(-(shares * np.log(shares)).sum()) + 0.0,
        bin_bytes=bin_path.stat().st_size,
        idx_bytes=idx_path.stat().st_size,
        sha256=sha256(bin_path, idx_path),
    )


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
