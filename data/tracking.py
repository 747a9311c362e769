"""Variable tracking: chains of assignments, `x = 5 … y = x … z = y`, scattered in a haystack.

After RULER (arXiv 2404.06654, section 3.2), whose question is turned round. There the model lists all variables that
hold a value; with the answer in view while it is scored, each variable is then but one assignment away from the one
before it. Here the last variable of a chain is named and its value asked for, so that `num_hops` assignments lie
between the two and have to be followed in one forward pass.

The null is the same task with the values asked for drawn anew: nothing in the window tells them, so no model can do
better than one in `num_values`.
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
    """num_chains, num_queries: a window holds; a chain is asked for once at most.

    num_hops:  assignments of one variable to another in a chain; its first variable is assigned a value.
    num_names, num_values: distinct ids of either; with one that assigns, they come after those of the haystack.
    haystack:  how many ids of noise, or a source whose windows it is made of.
    null_task: answers that cannot be known.
    split:     the two never share their draws.
    """

    num_chains: int = 2
    num_hops: int = 1
    num_queries: int = 1
    num_names: int = 64
    num_values: int = 64
    haystack: int | dict[str, Any] = 64
    null_task: bool = False
    split: Literal["train", "valid"] = "train"

    def __post_init__(self) -> None:
        if not 1 <= self.num_queries <= self.num_chains:
            raise ValueError(
                "1 ≤ num_queries ≤ num_chains is needed, because a chain is asked for once at most, but they are "
                f"{self.num_queries} and {self.num_chains}."
            )
        if self.num_hops < 0 or self.num_chains * (self.num_hops + 1) > self.num_names:
            raise ValueError(
                f"{self.num_chains} chains of {self.num_hops} hops need {self.num_chains * (self.num_hops + 1)} names, "
                f"each given once, but num_names is {self.num_names}."
            )
        if self.num_values < 2:
            raise ValueError(f"num_values is {self.num_values}, but an answer needs at least 2 to choose from.")
        check(self.haystack)

    def open(self) -> Tracking:
        return Tracking(self)


class Tracking:
    """Windows of the task; endless, so without epochs."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.haystack = Haystack(config.haystack)
        self.fingerprint = fingerprint(dataclasses.replace(config, haystack=1), self.haystack)
        self.vocab = self.haystack.vocab + 1 + config.num_names + config.num_values
        self.num_tokens: int | None = None
        self.tokenizer = self.haystack.tokenizer
        self.bytes_per_token: float | None = None
        self.unigram_entropy = math.log(config.num_values)
        self.facts: Facts = {
            "task": "variable_tracking",
            "hops": config.num_hops,
            "chains": config.num_chains,
            "queries": config.num_queries,
            "null": config.null_task,
            "chance": 1 / config.num_values,
        }

    def window(self, index: int, sequence_length: int, lookahead: int, seed: int) -> Window:
        """See Source. One document; the values asked for alone are scored. A chain is in the order of its hops."""
        c = self.config
        chains, links, q = c.num_chains, c.num_hops + 1, c.num_queries
        n = chains * links
        num_hay = hay_length(sequence_length, 3 * n, 3 * q)
        key = (self.fingerprint, sequence_length)
        sizes = (c.num_names, chains, n, n, chains, q)
        bits = random_bits(sum(sizes), *key, seed, index)
        for_names, for_values, for_order, for_places, for_asked, for_null = np.split(bits, np.cumsum(sizes)[:-1])

        assign = self.haystack.vocab
        first_value = assign + 1 + c.num_names
        names = assign + 1 + np.argsort(for_names, kind="stable")[:n].reshape(chains, links)
        values = first_value + (for_values % np.uint64(c.num_values)).astype(np.int64)
        given = np.concatenate([values[:, None], names[:, :-1]], axis=1)
        statements = np.stack([names, np.full_like(names, assign), given], axis=2)

        # chains are dealt into a random order of statements, each its own from the first to the last
        dealt = np.repeat(np.arange(chains), links)[np.argsort(for_order, kind="stable")]
        turn = np.argsort(np.argsort(dealt, kind="stable"), kind="stable") % links
        asked = np.argsort(for_asked, kind="stable")[:q]
        drawn_anew = first_value + (for_null % np.uint64(c.num_values)).astype(np.int64)
        return assemble(
            hay=self.haystack.draw(num_hay, index, seed, *key),
            statements=statements[dealt, turn],
            places=scatter(for_places, 0, num_hay),
            questions=np.stack([names[asked, -1], np.full(q, assign)], axis=1),
            answers=(drawn_anew if c.null_task else values[asked])[:, None],
            lookahead=lookahead,
        )
