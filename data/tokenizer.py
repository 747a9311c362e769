"""Text to token ids: plain bytes, or a Hugging Face tokenizer.json. Imports `tokenizers` when one is opened."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from conf.schema import Refused
from data import pieces

FILE_NAME = "tokenizer.json"  # in a prepared corpus: the tokenizer that made it


class Tokenizer(Protocol):
    """fingerprint names its content; every id is below `vocab`; `end_of_document` ends a document; `file` holds it."""

    @property
    def file(self) -> Path | None: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def vocab(self) -> int: ...
    @property
    def end_of_document(self) -> int: ...

    def encode(self, texts: list[str]) -> list[NDArray[Any]]:
        """The ids of each text, without the end of document."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special tokens by name; what is no whole character reads as U+FFFD."""
        ...


class Bytes:
    """The bytes of UTF-8, and one id more that ends a document."""

    file = None
    fingerprint = "bytes"
    end_of_document = 256
    vocab = 257

    def encode(self, texts: list[str]) -> list[NDArray[Any]]:
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i != self.end_of_document).decode(errors="replace")


@dataclass(frozen=True)
class HuggingFace:
    """A tokenizer.json. Raises Refused where it cannot be read or does not say what ends a document.

    Text that happens to spell a special token is encoded as text: else a document could hold the end of a document.
    """

    path: str
    end: str | None

    @cached_property
    def library(self) -> Any:
        """The `tokenizers.Tokenizer`."""
        from tokenizers import Tokenizer as Fast

        try:
            tokenizer = Fast.from_file(self.path)
        except Exception as error:  # the library raises plain Exception for every fault of the file
            raise Refused(f"tokenizer {self.path} is not a tokenizer.json that can be read: {error}.") from None
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @property
    def file(self) -> Path:
        return Path(self.path)

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(Path(self.path).read_bytes()).hexdigest()

    @cached_property
    def vocab(self) -> int:
        return 1 + max(self.library.get_vocab(with_added_tokens=True).values(), default=0)

    @cached_property
    def end_of_document(self) -> int:
        special = {t.content: i for i, t in self.library.get_added_tokens_decoder().items() if t.special}
        if self.end is None and len(special) == 1:
            return next(iter(special.values()))
        known = ", ".join(special) or "it has none"
        if self.end is None:
            raise Refused(f"which token ends a document? Give end_of_document=TOKEN (special tokens: {known}).")
        if (token := self.library.token_to_id(self.end)) is None:
            raise Refused(
                f"end_of_document is '{self.end}', which is no token of {self.path} (special tokens: {known})."
            )
        return token

    def encode(self, texts: list[str]) -> list[NDArray[Any]]:
        return pieces.encode(self.library, texts)

    def decode(self, ids: list[int]) -> str:
        return self.library.decode(ids, skip_special_tokens=False)


@lru_cache(maxsize=1)
def open_tokenizer(name: str, end_of_document: str | None) -> Tokenizer:
    """`bytes`, or the path of a tokenizer.json. Raises Refused."""
    if name != "bytes":
        if not Path(name).is_file():
            raise Refused(f"tokenizer is '{name}', which is neither 'bytes' nor a tokenizer.json file.")
        return HuggingFace(name, end_of_document)
    if end_of_document is not None:
        raise Refused("the bytes tokenizer ends documents with an id of its own; leave end_of_document out.")
    return Bytes()
