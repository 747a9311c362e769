"""A byte-level BPE trained on a sample of a source, by the `tokenizers` library."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from conf.schema import Refused
from data.files import may
from data.pieces import PIECE
from data.records import Texts
from data.texts import TextSource
from data.workers import run_apart

END = "<|end_of_document|>"
# Words as GPT-4 cuts them (the pattern cl100k_base of OpenAI's tiktoken, as Qwen2 and Llama 3 use it): runs of digits
# in threes, line ends apart from words, indentation in one piece.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BORDER = re.compile(r"\n(?=\S)")  # where a word of these ends whatever is around
SMALLEST = 257  # the bytes and the end of a document


@dataclass(frozen=True)
class TrainTokenizer(TextSource):
    """Text to OUT, a tokenizer.json for `prepare tokenizer=OUT`: byte-level BPE with <|end_of_document|> as id 0."""

    out: str = field(metadata={"help": "file to make"})
    vocab: int = field(default=32768, metadata={"help": "tokens, with the 256 bytes and the end of a document"})
    sample: int = field(
        default=128 << 20, metadata={"help": "bytes of text to train on; memory grows with this, not with the source"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocab < SMALLEST:
            raise ValueError(f"vocab is {self.vocab}, but the bytes and the end of a document take {SMALLEST}.")
        if self.sample < 1:
            raise ValueError(f"sample is {self.sample}, but at least 1 byte is needed.")


def train_tokenizer(request: TrainTokenizer) -> str:
    """Train and write OUT in one act. The same source and settings give the same file.

    Raises Refused where the source cannot be used, OUT is there already or cannot be.
    """
    out = Path(request.out)
    if os.path.exists(out):
        raise Refused(f"{out} exists; choose another out or remove it.")
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir() or not may(above, os.W_OK):  # learning takes minutes
        raise Refused(f"{out} cannot be made in {above}; choose another out.")
    # the library runs this process's signal handlers only when it has done
    made = run_apart(_train, request, modules=[__name__, "tokenizers"])
    if not made.documents:
        raise Refused(
            f"{request.source} gives no text in a sample of {request.sample:,} bytes; name a source that holds text, "
            "or take a larger sample if it is longer than that."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        aside.write_text(made.tokenizer, encoding="utf-8")
        aside.rename(out)
    finally:
        aside.unlink(missing_ok=True)
    few = "" if made.tokens == request.vocab else f" (not {request.vocab:,}: the sample holds no more pairs to merge)"
    return f"{out}: {made.tokens:,} tokens{few} from {made.documents:,} documents of {made.bytes:,} bytes."


class _Made(NamedTuple):
    """tokenizer: the text of its file. tokens: that it has. documents, bytes: of the sample."""

    tokenizer: str
    tokens: int
    documents: int
    bytes: int


def _train(request: TrainTokenizer) -> _Made:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS), "isolated"), bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=request.vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tqdm.set_lock(threading.RLock())  # its own is shared by processes, and would be left behind by one that is killed
    taken = _Sample(request.open(), request.sample)
    tokenizer.train_from_iterator(iter(taken), trainer)
    return _Made(tokenizer.to_str(pretty=True), tokenizer.get_vocab_size(), taken.documents, taken.bytes)


class _Sample:
    """Documents of about `size` bytes: of a source of known size those whose hash is small enough, else the first."""

    def __init__(self, texts: Texts, size: int) -> None:
        self._texts = texts
        self._size = size
        share = 1.0 if not texts.size else min(size / texts.size, 1.0)
        self._threshold = int(share * 2**64)
        self.documents = 0
        self.bytes = 0

    def __iter__(self) -> Iterator[str]:
        with tqdm(total=self._size, unit="B", unit_scale=True, desc="sample", disable=None) as bar:
            for portion in self._texts.portions():
                for record in portion.records():
                    if record.text is None or record.document >= self._threshold:
                        continue
                    if self._texts.size is None and self.bytes >= self._size:
                        return
                    read = len(record.text.encode())
                    self.documents += 1
                    self.bytes += read
                    bar.update(read)
                    yield from cut(record.text)


def cut(text: str, piece: int = PIECE) -> Iterator[str]:
    """The text in pieces of about `piece` characters that have its words."""
    begin = 0
    while border := BORDER.search(text, begin + piece):
        yield text[begin : border.end()]
        begin = border.end()
    yield text[begin:]
