"""A text encoded in pieces has the ids of the whole, whatever the tokenizer does to it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from data import pieces
from data.train_tokenizer import WORDS

REACH = 24
PIECE = 5 * REACH
SAMPLE = [
    "the name of a thing is not the thing itself\n\tif (name == NULL)\n\t\treturn 0x1234;\n" * 3,
    "1234567890 12 123 000000 aaaa aaaaaaaa          \n\n\n        }    \n"
    "  naïve 日本語 e\u0301 ▁ 𐍈𐍈 'they're' 10.000,5\r\n" * 3,
]


def bpe(pre_tokenizer: Any = None, normalizer: Any = None, **settings: Any) -> Tokenizer:
    """Trained on the sample until nothing is left to merge, so that tokens may be as long as words."""
    tokenizer = Tokenizer(models.BPE(unk_token="?", **settings))
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["?"], initial_alphabet=alphabet, show_progress=False, max_token_length=40
    )
    tokenizer.train_from_iterator(SAMPLE, trainer)
    return tokenizer


def of_bytes(*before: Any) -> Any:
    """Words as `before` cuts them, spelt in bytes."""
    return pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="?", max_input_chars_per_word=50))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["?"], show_progress=False)
    tokenizer.train_from_iterator(SAMPLE, trainer)
    return tokenizer


def with_added_tokens() -> Tokenizer:
    tokenizer = bpe(of_bytes(split(WORDS)))
    tokenizer.add_tokens(["the thing", AddedToken("NULL", lstrip=True, rstrip=True)])
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.encode_special_tokens = True
    return tokenizer


def trimmed() -> Tokenizer:
    tokenizer = bpe(pre_tokenizers.ByteLevel(add_prefix_space=True))
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


MADE: dict[str, Callable[[], Tokenizer]] = {
    "our-own": lambda: bpe(of_bytes(split(WORDS))),
    "gpt2": lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "prefix-space-and-trimmed-offsets": trimmed,
    "white-space-before-a-word": lambda: bpe(of_bytes(split(r"\s+(?!\S)|\s+|\S+"))),
    "metaspace-first": lambda: bpe(pre_tokenizers.Metaspace(prepend_scheme="first")),
    "metaspace-always": lambda: bpe(pre_tokenizers.Metaspace(prepend_scheme="always")),
    "metaspace-not-split": lambda: bpe(pre_tokenizers.Metaspace(prepend_scheme="never", split=False)),
    "no-words": lambda: bpe(of_bytes()),
    "lines-are-words": lambda: bpe(of_bytes(split(r"\n"))),
    "digits-one-by-one": lambda: bpe(of_bytes(pre_tokenizers.Digits(individual_digits=True))),
    "each-space-a-word": lambda: bpe(of_bytes(split(" "))),
    "words-of-five-characters": lambda: bpe(of_bytes(split(r"[\s\S]{1,5}"))),
    "nfc": lambda: bpe(of_bytes(split(WORDS)), normalizers.NFC()),
    "nfkd-without-accents": lambda: bpe(
        of_bytes(split(WORDS)), normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents()])
    ),
    "strip": lambda: bpe(of_bytes(split(WORDS)), normalizers.Strip()),
    "prepend": lambda: bpe(of_bytes(split(WORDS)), normalizers.Prepend("a")),
    "llama2": lambda: bpe(None, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])),
    "runs-of-space-made-one": lambda: bpe(of_bytes(split(WORDS)), normalizers.Replace(Regex(r"\s+"), " ")),
    "bert": word_piece,
    "added-tokens": with_added_tokens,
}


WHOLE = {"metaspace-not-split", "no-words", "strip", "prepend", "llama2"}  # no words, or each text is changed as such


@cache
def made(name: str) -> Tokenizer:
    return MADE[name]()


RUNS = st.tuples(
    st.sampled_from([" ", "\n", "\t", "1", "a", "0 ", "ab ", "é", "e\u0301", "日", "\r\n", "a\n", "▁"]),
    st.integers(1, 300),
)
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(SAMPLE),
        st.text(st.characters(codec="utf-8"), max_size=60),
        st.text("a1 \n", max_size=90),
        st.builds(lambda run: run[0] * run[1], RUNS),
        st.sampled_from(["NULL ", " the thing", "<end>", "name = 1234567;\n" * 9]),
    ),
    min_size=1,
    max_size=9,
).map("".join)


@pytest.mark.parametrize("name", MADE)
@settings(max_examples=settings().max_examples // 3)
@given(text=TEXTS)
@example(text="é" * 100 + "0 " * 44 + SAMPLE[0])  # five at a time, the same ids for a while from wherever one counts
def test_pieces_have_the_ids_of_the_whole(name: str, text: str) -> None:
    tokenizer = made(name)
    (found,) = pieces.encode(tokenizer, [text], PIECE, REACH)
    assert found.tolist() == tokenizer.encode(text, add_special_tokens=False).ids


class Watched:
    """A tokenizer that keeps the length of the longest text it was given."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.longest = 0

    def encode_batch_fast(self, texts: list[str], **how: Any) -> Any:
        self.longest = max([self.longest, *map(len, texts)])
        return self._tokenizer.encode_batch_fast(texts, **how)

    def encode(self, text: str, **how: Any) -> Any:
        self.longest = max(self.longest, len(text))
        return self._tokenizer.encode(text, **how)


@pytest.mark.parametrize("name", MADE)
def test_most_tokenizers_never_see_a_long_text_whole(name: str) -> None:
    watched = Watched(made(name))
    text = "".join(SAMPLE) * 20
    pieces.encode(watched, [text], 2 * PIECE, 2 * REACH)
    assert (watched.longest == len(text)) if name in WHOLE else (watched.longest < len(text) / 4)


def test_short_and_long_texts_keep_their_order() -> None:
    texts = ["a", "".join(SAMPLE), "", "1234 " * 99, "the end"]
    tokenizer = made("our-own")
    expected = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert [ids.tolist() for ids in pieces.encode(tokenizer, texts, PIECE, REACH)] == expected
    assert pieces.encode(tokenizer, [], PIECE, REACH) == []
