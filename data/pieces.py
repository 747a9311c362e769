"""A long text to token ids piece by piece: `tokenizers` takes hundreds of bytes a token, and a text may be megabytes.

A tokenizer cuts text into words and tokenizes each by itself, so pieces that meet where a word begins have the ids of
the whole if the tokenizer sees the same words in them. That is not taken for granted. A piece and the next overlap, and
around the place where they meet a window is encoded by itself, up to the first one's end. They are joined if

- a word begins there, in the window, beside white space and far from the window's ends;
- the first piece ends in the window's ids and words: the words are those of the text read from its beginning;
- the second piece begins with the ids and words the window goes on with: nothing is done to a text's beginning alone.

Ids alone would not do: words of five characters, counted from the beginning, may give the same ids for a while wherever
the count begins. Where no word begins (a run of letters, a tokenizer without words) the piece is made longer. Where ids
or words disagree (the tokenizer counts, or puts something before each text) the text is encoded whole.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

PIECE = 512 << 10  # characters handed over at once: some 100 MiB. Pieces keep words, which takes half as long again
REACH = 1024  # characters: what is farther away than this is taken to have no say in where a word begins

Ids = NDArray[np.int32]
Marked = NDArray[np.int64]
"""Each token's id, doubled, and one more where a word begins."""


def encode(tokenizer: Any, texts: list[str], piece: int = PIECE, reach: int = REACH) -> list[Ids]:
    """The ids of each text by a `tokenizers.Tokenizer`, without special tokens. piece: at least 5 times `reach`."""
    short = iter(_ids(tokenizer, [text for text in texts if len(text) <= piece]))
    return [next(short) if len(text) <= piece else _long(tokenizer, text, piece, reach) for text in texts]


class _Border(NamedTuple):
    """Where a word begins in a window. back: characters, before: tokens from the window's start that is settled to it.

    after: all tokens behind it. sure: how many of them lie far from the window's end.
    """

    back: int
    before: Marked
    after: Marked
    sure: int


def _long(tokenizer: Any, text: str, piece: int, reach: int) -> Ids:
    made: list[Ids] = []
    begin, length = 0, piece
    expected = np.empty(0, np.int64)
    while (end := begin + length) < len(text):
        border = _find_border(tokenizer, text[end - 5 * reach : end], reach)
        if border is None:
            length += length // 4
            continue
        marked = _marked(_encoded(tokenizer, text[begin:end]))
        known = np.concatenate([border.before, border.after])
        if not (_starts(marked, expected) and _starts(marked[::-1], known[::-1])):
            return _ids(tokenizer, [text])[0]
        made.append(_unmarked(marked[: len(marked) - len(border.after)]))
        expected = border.after[: border.sure]
        begin, length = end - border.back, piece
    marked = _marked(_encoded(tokenizer, text[begin:]))
    return np.concatenate([*made, _unmarked(marked)]) if _starts(marked, expected) else _ids(tokenizer, [text])[0]


def _find_border(tokenizer: Any, window: str, reach: int) -> _Border | None:
    """The last in the middle of the window, if there is any; one before a single space where there is one.

    Tokenizers that put a space before each text do so only where there is none.
    """
    encoded = _encoded(tokenizer, window)
    marked, offsets = _marked(encoded), encoded.offsets
    found = []
    for token in range(1, len(marked)):
        at = offsets[token][0]
        if window[at - 1 : at] == " " and offsets[token - 1][1] == at - 1:  # the tokenizer drops spaces
            at -= 1
        begins = marked[token] % 2 and 2 * reach <= at < 3 * reach
        if begins and window[at].isspace() != window[at - 1].isspace():
            found.append((window[at] == " ", at, token))
    if not found:
        return None
    _, at, token = max(found)
    settled = sum(begin < reach for begin, _ in offsets)
    sure = sum(end <= 4 * reach for _, end in offsets)
    if sure <= token:  # a token that reaches beyond
        return None
    return _Border(len(window) - at, marked[settled:token], marked[token:], sure - token)


def _encoded(tokenizer: Any, text: str) -> Any:
    return tokenizer.encode(text, add_special_tokens=False)


def _marked(encoded: Any) -> Marked:
    words = np.array([-1 if word is None else word for word in encoded.word_ids], np.int64)
    return np.array(encoded.ids, np.int64) * 2 + (np.diff(words, prepend=-2) != 0)


def _unmarked(marked: Marked) -> Ids:
    return (marked // 2).astype(np.int32)


def _ids(tokenizer: Any, texts: list[str]) -> list[Ids]:
    encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)  # which keeps no offsets and no words
    return [np.array(one.ids, np.int32) for one in encoded]


def _starts(marked: Marked, expected: Marked) -> bool:
    return np.array_equal(marked[: len(expected)], expected)
