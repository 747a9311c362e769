"""A long text to token ids piece by piece: `tokenizers` takes hundreds of bytes a token, and a text may be megabytes.

A tokenizer cuts text into words and tokenizes each by itself, so pieces that meet where a word begins have the ids of
the whole if the tokenizer sees the same words in them. That is not taken for granted. A piece and the next overlap, and
around the place where they meet a window is encoded by itself, up to the first one's end. They are joined if

- a word begins there, in the window, beside white space and far from the window's ends;
- the first piece's ids end as the window's do: the words are those of the text read from its beginning;
- the second piece's ids begin as the window's go on: nothing is done to the beginning of a text alone.

Where no word begins (a run of letters, a tokenizer without words) the piece is made longer. Where ids disagree (the
tokenizer puts something before each text, or counts characters from its beginning) the text is encoded whole.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

PIECE = 128 << 10  # characters handed over at once
REACH = 1024  # characters: what is farther away than this is taken to have no say in where a word begins

Ids = NDArray[np.int32]


def encode(tokenizer: Any, texts: list[str], piece: int = PIECE, reach: int = REACH) -> list[Ids]:
    """The ids of each text by a `tokenizers.Tokenizer`, without special tokens. piece: at least 5 times `reach`."""
    short = iter(_ids(tokenizer, [text for text in texts if len(text) <= piece]))
    return [next(short) if len(text) <= piece else _long(tokenizer, text, piece, reach) for text in texts]


class _Border(NamedTuple):
    """Where a word begins in a window. back: characters, before: ids from the window's start that is settled to it.

    after: all ids behind it. sure: how many of them lie far from the window's end.
    """

    back: int
    before: Ids
    after: Ids
    sure: int


def _long(tokenizer: Any, text: str, piece: int, reach: int) -> Ids:
    made: list[Ids] = []
    begin, length = 0, piece
    expected = np.empty(0, np.int32)
    while (end := begin + length) < len(text):
        border = _find_border(tokenizer, text[end - 5 * reach : end], reach)
        if border is None:
            length += length // 4
            continue
        (ids,) = _ids(tokenizer, [text[begin:end]])
        known = np.concatenate([border.before, border.after])
        if not (_starts(ids, expected) and _starts(ids[::-1], known[::-1])):
            return _ids(tokenizer, [text])[0]
        made.append(ids[: len(ids) - len(border.after)])
        expected = border.after[: border.sure]
        begin, length = end - border.back, piece
    (ids,) = _ids(tokenizer, [text[begin:]])
    return np.concatenate([*made, ids]) if _starts(ids, expected) else _ids(tokenizer, [text])[0]


def _find_border(tokenizer: Any, window: str, reach: int) -> _Border | None:
    """The last in the middle of the window, if there is any; one before a single space where there is one.

    Tokenizers that put a space before each text do so only where there is none.
    """
    encoded = tokenizer.encode(window, add_special_tokens=False)
    ids, words, offsets = np.array(encoded.ids, np.int32), encoded.word_ids, encoded.offsets
    found = []
    for token in range(1, len(ids)):
        at = offsets[token][0]
        if window[at - 1 : at] == " " and offsets[token - 1][1] == at - 1:  # the tokenizer drops spaces
            at -= 1
        begins = words[token] != words[token - 1] and 2 * reach <= at < 3 * reach
        if begins and window[at].isspace() != window[at - 1].isspace():
            found.append((window[at] == " ", at, token))
    if not found:
        return None
    _, at, token = max(found)
    settled = sum(begin < reach for begin, _ in offsets)
    sure = sum(end <= 4 * reach for _, end in offsets)
    if sure <= token:  # a token that reaches beyond
        return None
    return _Border(len(window) - at, ids[settled:token], ids[token:], sure - token)


def _ids(tokenizer: Any, texts: list[str]) -> list[Ids]:
    encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)  # which keeps no offsets
    return [np.array(one.ids, np.int32) for one in encoded]


def _starts(ids: Ids, expected: Ids) -> bool:
    return np.array_equal(ids[: len(expected)], expected)
