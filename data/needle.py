"""Needles in a haystack: single, multi-key and multi-query (RULER, arXiv 2404.06654, section 3.1).

A needle is a key and its value. At the end of the window keys are named again, and the tokens after each are its
needle's value. Other needles than those asked for are there to be confused with them.

The null is the same task with the values asked for drawn anew: nothing in the window tells them, so no model can do
better than one in `num_values` a token.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from data.haystack import Haystack, assemble, check, fingerprint, hay_length, scatter
from data.source import Facts, Window, random_bits


@dataclass(frozen=True)
class Config:
    """num_needles, num_queries: a window holds; a needle is asked for once at most.

    num_keys, num_values: distinct ids of either; they come after those of the haystack. value_tokens: of one needle.
    depth:     what share of the hay, and of the other needles, lies before the needle asked for; drawn if it is null.
    haystack:  how many ids of noise, or a source whose windows it is made of.
    null_task: answers that cannot be known.
    split:     the two never share their draws.
    """

    num_needles: int = 1
    num_queries: int = 1
    num_keys: int = 64
    num_values: int = 64
    value_tokens: int = 1
    depth: float | None = None
    haystack: int | dict[str, Any] = 64
    null_task: bool = False
    split: Literal["train", "valid"] = "train"

    def __post_init__(self) -> None:
        if not 1 <= self.num_queries <= self.num_needles <= self.num_keys:
            raise ValueError(
                "1 ≤ num_queries ≤ num_needles ≤ num_keys is needed, because a key is given and asked for once, but "
                f"they are {self.num_queries}, {self.num_needles} and {self.num_keys}."
            )
        if self.num_values < 2 or self.value_tokens < 1:
            raise ValueError(
                f"num_values is {self.num_values} and value_tokens {self.value_tokens}, but an answer needs at least 2 "
                "values to choose from and 1 token."
            )
        if self.depth is not None and not (0 <= self.depth <= 1 and self.num_queries == 1):
            raise ValueError(
                f"depth is {self.depth} with {self.num_queries} queries, but it is a share from 0 to 1 of one needle."
            )
        check(self.haystack)

    def open(self) -> Needle:
        return Needle(self)


class Needle:
    """Windows of the task; endless, so without epochs."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.haystack = Haystack(config.haystack)
        self.fingerprint = fingerprint(dataclasses.replace(config, haystack=1), self.haystack)
        self.vocab = self.haystack.vocab + config.num_keys + config.num_values
        self.num_tokens: int | None = None
        self.tokenizer = self.haystack.tokenizer
        self.bytes_per_token: float | None = None
        self.unigram_entropy = math.log(config.num_values)
        self.facts: Facts = {
            "task": "niah",
            "depth": config.depth,
            "keys": config.num_needles,
            "queries": config.num_queries,
            "null": config.null_task,
            "chance": 1 / config.num_values,
        }

    def window(self, index: int, sequence_length: int, lookahead: int, seed: int) -> Window:
        """See Source. One document; the values asked for alone are scored."""
        c = self.config
        n, q, m = c.num_needles, c.num_queries, c.value_tokens
        num_hay = hay_length(sequence_length, n * (1 + m), q * (1 + m))
        key = (self.fingerprint, sequence_length)
        sizes = (c.num_keys, n * m, n, n, q * m)
        bits = random_bits(sum(sizes), *key, seed, index)
        for_keys, for_values, for_places, for_asked, for_null = np.split(bits, np.cumsum(sizes)[:-1])

        first_key = self.haystack.vocab
        first_value = first_key + c.num_keys
        keys = first_key + np.argsort(for_keys, kind="stable")[:n, None]
        values = first_value + (for_values % np.uint64(c.num_values)).astype(np.int64).reshape(n, m)
        if c.depth is None:
            places = scatter(for_places, 0, num_hay)
            asked = np.argsort(for_asked, kind="stable")[:q]
        else:
            others, place = round(c.depth * (n - 1)), round(c.depth * num_hay)
            before = scatter(for_places[:others], 0, place)
            places = np.concatenate([before, [place], scatter(for_places[others + 1 :], place, num_hay)])
            asked = np.array([others])
        drawn_anew = first_value + (for_null % np.uint64(c.num_values)).astype(np.int64).reshape(q, m)
        return assemble(
            hay=self.haystack.draw(num_hay, index, seed, *key),
            statements=np.concatenate([keys, values], axis=1),
            places=places,
            questions=keys[asked],
            answers=drawn_anew if c.null_task else values[asked],
            lookahead=lookahead,
        )
