"""A prepared corpus as an endless stream of documents, cut into windows.

In each epoch the documents are permuted by a permutation that depends on (fingerprint, seed, epoch) alone; the epochs
follow each other in one endless stream of tokens, and window i holds S inputs from token i·S and the tokens after them.
So every token is an input exactly once an epoch, and windows run across documents and across epochs without a gap.
A run reads the windows of an epoch in another order again: see `data/shuffle.py`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from conf.schema import Refused
from data.manifest import ANEW, Manifest, Split, sha256
from data.megatron import indexed_dataset
from data.source import Facts, Window, random_bits

CHECKED_WHOLE = 256 << 20  # bytes; a smaller corpus is hashed whole when opened, which takes under a second


@dataclass(frozen=True)
class Config:
    """path: folder that `python -m data prepare` wrote. split: which of its two parts."""

    path: str
    split: Literal["train", "valid"] = "train"

    def open(self) -> Corpus:
        return Corpus(Path(self.path), self.split)


class Corpus:
    """One split of a prepared corpus, read through megatron-core; a sequence of its files is a document.

    Opening it raises Refused where a file is missing, empty, truncated or otherwise not what the manifest says.
    Its order is held in memory: about 24 bytes a document.
    """

    def __init__(self, folder: Path, split: str) -> None:
        manifest = Manifest.read(folder)
        facts = manifest.splits[split]
        self._check_files(folder, split, manifest)
        self.name = f"{folder} ({split})"
        self.vocab = manifest.vocab
        self.num_tokens: int = facts.tokens
        self.bytes_per_token = facts.bytes / facts.tokens
        self.unigram_entropy = facts.unigram_entropy
        self.fingerprint = facts.sha256
        self.tokenizer = str(manifest.settings.get("tokenizer", f"one of {self.vocab} ids"))
        self.facts: Facts = {}
        self._dataset, lengths, begins = self._read_index(folder / split, facts)
        full = np.flatnonzero(lengths)  # a document of no token has no place in a stream of tokens
        self._lengths = lengths[full].astype(np.int32)
        self._begins = begins[full]
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def window(self, index: int, sequence_length: int, lookahead: int, seed: int) -> Window:
        """See Source. Starts are the document borders of the stream; every token may be a target."""
        first = index * sequence_length
        end = first + sequence_length + lookahead
        tokens, starts = [], [np.zeros(1, np.int64)]
        at = first
        while at < end:
            epoch, begin = divmod(at, self.num_tokens)
            stop = min(begin + end - at, self.num_tokens)
            part, borders = self._read(seed, epoch, begin, stop)
            tokens.append(part)
            starts.append(borders + (at - first))
            at += stop - begin
        joined = np.concatenate(starts)
        return Window(
            tokens=tokens[0] if len(tokens) == 1 else np.concatenate(tokens),
            starts=joined[1:] if len(joined) > 1 and joined[1] == 0 else joined,
        )

    def _read(self, seed: int, epoch: int, begin: int, stop: int) -> tuple[NDArray, NDArray[np.int64]]:
        """Tokens [begin, stop) of an epoch, and the offsets from `begin` at which a document begins."""
        order, borders = self._epoch(seed, epoch)
        low = int(np.searchsorted(borders, begin, side="right")) - 1
        high = int(np.searchsorted(borders, stop, side="left"))
        documents = order[low:high]
        stream = borders[low:high]
        counts = np.minimum(stream + self._lengths[documents], stop) - np.maximum(stream, begin)
        # The distance from a token's place in the stream to its place in the file is one number a document.
        places = np.repeat(self._begins[documents] - stream, counts)
        places += np.arange(begin, stop)
        index = self._dataset.index
        # Read anew each time: a view kept for longer would keep Megatron from closing its file.
        file = self._dataset.bin_reader.read(dtype=index.dtype, count=self.num_tokens, offset=0)
        return file[places], stream[stream >= begin] - begin

    def _draw_epoch(self, seed: int, epoch: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """The documents in this epoch's order, and the offset in the epoch at which each begins."""
        bits = random_bits(len(self._lengths), "epoch", self.fingerprint, seed, epoch)
        order = np.argsort(bits, kind="stable")
        lengths = self._lengths[order]
        return order.astype(np.int32), np.cumsum(lengths, dtype=np.int64) - lengths

    @staticmethod
    def _check_files(folder: Path, split: str, manifest: Manifest) -> None:
        facts = manifest.splits[split]
        if facts.tokens == 0:
            raise Refused(
                f"{folder} has an empty split '{split}'; prepare it from more files or another held_out share."
            )
        for suffix, size in (("bin", facts.bin_bytes), ("idx", facts.idx_bytes)):
            path = folder / f"{split}.{suffix}"
            if not path.is_file():
                raise Refused(f"{path} is missing although the manifest names it; {ANEW}.")
            if (actual := path.stat().st_size) != size:
                state = "truncated" if actual < size else "too long"
                raise Refused(f"{path} is {state}: {actual} bytes where the manifest says {size}; {ANEW}.")
        if facts.bin_bytes <= CHECKED_WHOLE and (
            sha256(folder / f"{split}.bin", folder / f"{split}.idx") != facts.sha256
        ):
            raise Refused(f"{folder}/{split}.bin or .idx is damaged: its hash is not the manifest's; {ANEW}.")

    @staticmethod
    def _read_index(prefix: Path, facts: Split) -> tuple[Any, NDArray[np.int64], NDArray[np.int64]]:
        """Megatron's dataset, and the length and the place in the file, in tokens, of each of its sequences."""
        try:
            dataset = indexed_dataset().IndexedDataset(str(prefix))
            lengths = dataset.index.sequence_lengths.astype(np.int64)
            begins = dataset.index.sequence_pointers // dataset.index.dtype_size
        except (AssertionError, ValueError, KeyError, struct.error) as error:
            raise Refused(f"{prefix}.idx is not a Megatron index ({error}); {ANEW}.") from None
        in_file = facts.bin_bytes // dataset.index.dtype_size
        if (
            facts.tokens != in_file
            or lengths.sum() != in_file
            or (begins + lengths).max() > in_file
            or begins.min() < 0
        ):
            raise Refused(f"{prefix}.bin does not hold what {prefix}.idx says; {ANEW}.")
        return dataset, lengths, begins
