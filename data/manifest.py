"""manifest.json: what a prepared corpus holds, how it was made, and what was left out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from conf.schema import Refused, build

NAME = "manifest.json"
ANEW = "remove the corpus and prepare it again"  # prepare leaves one that is there alone, damaged or not

SplitName = Literal["train", "valid"]
SPLITS: tuple[SplitName, ...] = ("train", "valid")


@dataclass(frozen=True)
class Split:
    """One pair of token files.

    documents, tokens: of the split; each document ends in the end-of-document token, which is counted.
    bytes:             UTF-8 bytes of its text.
    unigram_entropy:   nats per token of the split's own token frequencies.
    bin_bytes, idx_bytes, sha256: sizes of the two files, and one hash over .bin then .idx.
    """

    documents: int
    tokens: int
    bytes: int
    unigram_entropy: float
    bin_bytes: int
    idx_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A prepared corpus.

    source:          in words.
    source_digest:   hash of every byte that was read, skipped documents included, with its file and place.
    settings:        what decides its bytes; the files by a hash of their names and sizes, the tokenizer by its own.
    vocab:           token ids are below it.
    end_of_document: the id that ends each document.
    skipped:         how many documents were left out, by rule.
    cut:             how many documents were longer than settings' max_document and became several.
    """

    source: str
    source_digest: str
    settings: dict[str, Any]
    vocab: int
    end_of_document: int
    splits: dict[str, Split]
    skipped: dict[str, int]
    cut: int = 0

    def __post_init__(self) -> None:
        if set(self.splits) != set(SPLITS):
            raise ValueError(f"splits are {', '.join(self.splits) or 'none'}, but {' and '.join(SPLITS)} are needed")

    def write(self, folder: Path) -> None:
        text = json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True)
        (folder / NAME).write_text(text + "\n", encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> Manifest:
        """The manifest in `folder`. Raises Refused where there is none or it cannot be read."""
        path = folder / NAME
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            command = shlex.join(["python", "-m", "data", "prepare", "source=stdlib", f"out={folder}"])
            raise Refused(
                f"{folder} holds no prepared corpus ({NAME} is missing); "
                f"make one with `{command}`, or name another path."
            ) from None
        except OSError as error:
            raise Refused(f"{path} cannot be read ({error.strerror}); see to that, or name another path.") from None
        except (ValueError, RecursionError) as error:
            raise Refused(f"{path} cannot be read ({error}); {ANEW}.") from None
        try:
            return build(Manifest, values, "manifest")
        except Refused as refusal:
            sentence = str(refusal).rstrip(".")
            raise Refused(f"{path} is no manifest of this version ({sentence}); {ANEW}.") from None


def sha256(*paths: Path) -> str:
    """One hash over the contents of `paths`, in order."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
