"""Text to ids and back, as the model at hand was trained: bytes, or a tokenizer.json."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from conf.schema import Refused
from models.weights import CHECKPOINT, RUN, run_of

END_OF_BYTES = 256
"""The id that ends a document, after the 256 bytes."""


@dataclass(frozen=True)
class Codec:
    """encode: text to ids. decode: ids to pieces of text, as they come. end: the id that ends a document, or None."""

    encode: Callable[[str], list[int]]
    decode: Callable[[Iterable[int]], Iterator[str]]
    end: int | None


def codec_of(path: Path, tokenizer: str | None, vocab: int) -> Codec:
    """Of the file given, of one beside the model, its run or its corpus, or of bytes. Raises Refused."""
    run = run_of(path) if (path / CHECKPOINT).is_file() else path
    corpus = _corpus(run)
    manifest = _json(corpus / "manifest.json") if corpus else {}
    places = [path, run, *([corpus] if corpus else [])]
    file = tokenizer or next((str(p / "tokenizer.json") for p in places if (p / "tokenizer.json").is_file()), None)
    if file is not None:
        return _from_file(Path(file), manifest.get("end_of_document"))
    # a prepared corpus says what its ids are; without one, a vocabulary of 257, rounded up, is of bytes
    settings = manifest.get("settings")
    if settings["tokenizer"] == "bytes" if settings else END_OF_BYTES < vocab <= 512:
        return Codec(lambda text: list(text.encode()), _utf8, END_OF_BYTES)
    raise Refused(f"{path} has no tokenizer.json and its vocabulary of {vocab} is not of bytes; give --tokenizer FILE.")


def _corpus(run: Path) -> Path | None:
    """Where a run's training text came from; of several corpora, which share their tokenizer, the first."""
    try:
        train = yaml.safe_load((run / RUN).read_text())["data"]["train"]
        return next(Path(source["path"]) for source in (train, *train.values()) if "path" in (source or ()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration, yaml.YAMLError):
        return None


def _json(path: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, Mapping) else {}


def _utf8(ids: Iterable[int]) -> Iterator[str]:
    """Ids beyond the bytes are rows that round the vocabulary up; they stand for nothing."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in ids:
        if token < END_OF_BYTES:
            yield decoder.decode(bytes([token]))
    yield decoder.decode(b"", final=True)


def _from_file(path: Path, end: int | None) -> Codec:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for every fault of the file
        raise Refused(f"{path} is no tokenizer.json that can be read ({error}).") from None

    def pieces(ids: Iterable[int]) -> Iterator[str]:
        """A token may be part of a character, so all are decoded again and what is new is given."""
        made: list[int] = []
        shown = ""
        for token in ids:
            made.append(token)
            text = tokenizer.decode(made)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                yield text[len(shown) :]
                shown = text
        yield tokenizer.decode(made)[len(shown) :]

    known = end if end is not None else _end_beside(path, tokenizer)
    return Codec(lambda text: list(tokenizer.encode(text).ids), pieces, known)


def _end_beside(path: Path, tokenizer: Any) -> int | None:
    """The end that Transformers' tokenizer_config.json names, or the only special token that there is."""
    named = _json(path.with_name("tokenizer_config.json")).get("eos_token")
    text = named.get("content") if isinstance(named, Mapping) else named
    if text is not None:
        end: int | None = tokenizer.token_to_id(text)
        return end
    special = [token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special]
    return special[0] if len(special) == 1 else None
