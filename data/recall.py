"""Multi-query associative recall (Arora et al., arXiv 2312.04927, section 3 and appendix E).

A window is one document: pairs of key and value, then queries. A query is a key of one of the pairs, and the token
after it is that pair's value. Only those answers are scored. Queries lie at even offsets after the pairs, drawn
without replacement with probability ∝ i^(power − 1) of slot i, as in the paper; what is left is blank.

The null is the same task with the value of each queried key drawn anew, and each key queried once at most: nothing
in the window tells the answer, so no model can do better than one in `num_values`.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from conf.schema import Refused
from data.source import Facts, Window, random_bits

BLANK = 0


@dataclass(frozen=True)
class Config:
    """num_pairs, num_queries: a window holds; a key is queried at most once.

    num_keys, num_values: distinct keys and values; ids are one blank, the keys, then the values.
    power:     how queries gather near the pairs; 1 spreads them evenly.
    null_task: answers that cannot be known.
    split:     the two never share their draws.
    """

    num_pairs: int = 8
    num_queries: int = 8
    num_keys: int = 64
    num_values: int = 64
    power: float = 0.01
    null_task: bool = False
    split: Literal["train", "valid"] = "train"

    def __post_init__(self) -> None:
        if not 1 <= self.num_queries <= self.num_pairs <= self.num_keys:
            raise ValueError(
                "1 ≤ num_queries ≤ num_pairs ≤ num_keys is needed, because a key is queried at most once, but they are "
                f"{self.num_queries}, {self.num_pairs} and {self.num_keys}."
            )
        if self.num_values < 2:
            raise ValueError(f"num_values is {self.num_values}, but an answer needs at least 2 to choose from.")
        if not self.power > 0:
            raise ValueError(f"power is {self.power}, but it must be above 0.")

    def open(self) -> Recall:
        return Recall(self)


class Recall:
    """Windows of the task; endless, so without epochs."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.fingerprint = hashlib.blake2b(repr(config).encode(), digest_size=16).hexdigest()
        self.vocab = 1 + config.num_keys + config.num_values
        self.num_tokens: int | None = None
        self.tokenizer: str | None = None
        self.bytes_per_token: float | None = None
        self.unigram_entropy = math.log(config.num_values)
        self.facts: Facts = {
            "task": "recall",
            "pairs": config.num_pairs,
            "queries": config.num_queries,
            "null": config.null_task,
            "chance": 1 / config.num_values,
        }

    def window(self, index: int, sequence_length: int, lookahead: int, seed: int) -> Window:
        """See Source. One document; the answers alone are scored."""
        c = self.config
        num_slots = sequence_length // 2 - c.num_pairs
        if num_slots < c.num_queries:
            raise Refused(
                f"{c.num_pairs} pairs and {c.num_queries} queries need a sequence length of "
                f"{2 * (c.num_pairs + c.num_queries)}, but it is {sequence_length}."
            )
        sizes = (c.num_keys, c.num_pairs, c.num_pairs, num_slots, c.num_queries)
        bits = random_bits(sum(sizes), self.fingerprint, seed, index)
        for_keys, for_values, for_queried, for_slots, for_null = np.split(bits, np.cumsum(sizes)[:-1])

        keys = np.argsort(for_keys, kind="stable")[: c.num_pairs]
        values = (for_values % np.uint64(c.num_values)).astype(np.int64)
        queried = np.argsort(for_queried, kind="stable")[: c.num_queries]
        answers = (for_null % np.uint64(c.num_values)).astype(np.int64) if c.null_task else values[queried]

        # The smallest of exponential variables of rate w is a draw with probability ∝ w, the next one without it, ….
        weights = np.arange(1, num_slots + 1, dtype=np.float64) ** (c.power - 1)
        arrivals = -np.log((for_slots.astype(np.float64) + 1) / 2.0**64) / weights
        queries_at = 2 * (c.num_pairs + np.argsort(arrivals, kind="stable")[: c.num_queries])

        tokens = np.full(sequence_length + lookahead, BLANK, dtype=np.int64)
        first_value = 1 + c.num_keys
        tokens[0 : 2 * c.num_pairs : 2] = 1 + keys
        tokens[1 : 2 * c.num_pairs : 2] = first_value + values
        tokens[queries_at] = 1 + keys[queried]
        tokens[queries_at + 1] = first_value + answers
        scored = np.zeros(len(tokens), dtype=np.bool_)
        scored[queries_at + 1] = True
        return Window(tokens, np.zeros(1, np.int64), scored)
