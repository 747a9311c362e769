"""What the statements of a synthetic task are hidden in, and how a window is put together.

    hay … statement … hay … statement … hay   question answer   question answer

A window is one document. The questions stand at its end, so that its last answer is the target of its last input; the
answers alone are scored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conf.schema import Refused
from data.config import source_config
from data.source import Source, Window, random_bits

Tokens = NDArray[np.int64]
Settings = int | Mapping[str, Any]


class Haystack:
    """Noise of so many ids, or the windows of a source of text, `{source: corpus, path: …}`. Its ids are below `vocab`.

    The task's own ids come after them, so that no hay is ever taken for a statement. Making one raises Refused where
    the source holds no text.
    """

    def __init__(self, settings: Settings) -> None:
        self._source: Source | None = None
        if isinstance(settings, int):
            self.vocab, self.fingerprint, self.tokenizer = settings, f"noise of {settings}", None
        else:
            self._source = source = source_config(settings, "haystack").open()
            if source.bytes_per_token is None:
                raise Refused(
                    f"the haystack is {settings['source']}, which holds no text; give a corpus, or how many ids of "
                    "noise."
                )
            self.vocab, self.fingerprint, self.tokenizer = source.vocab, source.fingerprint, source.tokenizer

    def draw(self, count: int, index: int, seed: int, *key: object) -> Tokens:
        """`count` tokens of hay for window `index`."""
        if self._source is None:
            return (random_bits(count, "hay", *key, seed, index) % np.uint64(self.vocab)).astype(np.int64)
        if count == 0:
            return np.zeros(0, np.int64)
        return self._source.window(index, count, 0, seed).tokens.astype(np.int64)


def check(settings: Settings) -> None:
    """Raises ValueError where no haystack is like this."""
    if not isinstance(settings, int):
        try:
            source_config(settings, "haystack")
        except Refused as refusal:
            raise ValueError(str(refusal)) from None
    elif settings < 1:
        raise ValueError(f"haystack is {settings}, but noise needs at least 1 id.")


def hay_length(sequence_length: int, statements: int, questions: int) -> int:
    """Tokens of hay beside so many of statements and of questions with answers. Raises Refused without room."""
    left = sequence_length + 1 - statements - questions
    if left < 0:
        raise Refused(
            f"{statements} tokens of statements and {questions} of questions and answers need a sequence length of "
            f"{statements + questions - 1}, but it is {sequence_length}."
        )
    return left


def scatter(bits: NDArray[np.uint64], begin: int, end: int) -> Tokens:
    """Ascending offsets in the hay, from `begin` to `end` inclusive, one for each of `bits`: where statements go in."""
    return np.sort(begin + (bits % np.uint64(end - begin + 1)).astype(np.int64))


def assemble(
    hay: Tokens, statements: Tokens, places: Tokens, questions: Tokens, answers: Tokens, lookahead: int
) -> Window:
    """hay [F]; statements [n, a], each put before hay token `places` [n]; questions [q, b] with answers [q, m]."""
    body = np.insert(hay, np.repeat(places, statements.shape[1]), statements.ravel())
    asked = np.concatenate([questions, answers], axis=1)
    is_answer = np.zeros(asked.shape, np.bool_)
    is_answer[:, questions.shape[1] :] = True
    after = lookahead - 1  # beyond the last answer nothing is asked
    return Window(
        tokens=np.concatenate([body, asked.ravel(), np.zeros(after, np.int64)]),
        starts=np.zeros(1, np.int64),
        scored=np.concatenate([np.zeros(len(body), np.bool_), is_answer.ravel(), np.zeros(after, np.bool_)]),
    )


def fingerprint(config: object, haystack: Haystack) -> str:
    """Of a task's settings; of the haystack by content, wherever it lies. `config` is shown without its haystack."""
    return hashlib.blake2b(f"{config!r} in {haystack.fingerprint}".encode(), digest_size=16).hexdigest()
