"""Small corpora on disk, written by megatron-core as `python -m data prepare` would."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.manifest import Manifest, Split, sha256
from data.megatron import indexed_dataset


def write_corpus(folder: Path, documents: Sequence[Sequence[int]], vocab: int) -> Path:
    """A corpus whose train split holds `documents`; its held-out split is empty."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = {"train": _write(folder, "train", documents), "valid": _write(folder, "valid", [])}
    Manifest("a test", "", {}, vocab, vocab - 1, splits, {}).write(folder)
    return folder


def _write(folder: Path, split: str, documents: Sequence[Sequence[int]]) -> Split:
    bin_path, idx_path = folder / f"{split}.bin", folder / f"{split}.idx"
    builder = indexed_dataset().IndexedDatasetBuilder(str(bin_path), dtype=np.uint16)
    for document in documents:
        builder.add_document(np.array(document, dtype=np.uint16), [len(document)])
    builder.finalize(str(idx_path))
    tokens = sum(map(len, documents))
    return Split(
        documents=len(documents),
        tokens=tokens,
        bytes=2 * tokens,
        unigram_entropy=math.log(max(tokens, 1)),
        bin_bytes=bin_path.stat().st_size,
        idx_bytes=idx_path.stat().st_size,
        sha256=sha256(bin_path, idx_path),
    )
