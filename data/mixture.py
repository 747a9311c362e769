"""Several sources that a run trains on together, and the share of windows that each is to have."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import combinations

from conf.schema import Refused, unknown_choice
from data.source import Source

Weights = Mapping[str, float]

LONGEST_PERIOD = 1_000_000
"""Windows after which an order must repeat: a period, and near a leg's end as many as a source of the smallest share
can wait for its window, are held in memory, some 10 bytes a window."""


class Mixture:
    """Sources by name with their weights: the share of windows that each is to have, up to a common factor.

    One source is a mixture of itself alone. fingerprint: of all that is in it; the weights are not. tokenizer: of those
    that have one, all of which have the same (`refuse_other_tokenizers`); None where none has.
    Raises Refused where two hold the same data, which would then come twice in an epoch.
    """

    def __init__(self, sources: Mapping[str, Source], weights: Weights) -> None:
        for (one, a), (other, b) in combinations(sources.items(), 2):
            if a.fingerprint == b.fingerprint:
                raise Refused(f"data.train.{one} and {other} hold the same data; name it once, with both weights.")
        self.sources = dict(sources)
        self.weights = dict(weights)
        self.vocab = max(source.vocab for source in sources.values())
        self.tokenizer = next((source.tokenizer for source in sources.values() if source.tokenizer is not None), None)
        prints = [(name, source.fingerprint) for name, source in sources.items()]
        together = hashlib.blake2b(repr(prints).encode(), digest_size=16).hexdigest()
        self.fingerprint = together if len(prints) > 1 else prints[0][1]

    def shares(self, weights: Weights | None) -> list[Fraction]:
        """Of each source, in order, its exact share under `weights`; None: under the mixture's own."""
        weights = self.weights if weights is None else weights
        return exact_shares([weights[name] for name in self.sources], "the mixture")


def exact_shares(weights: Sequence[float], where: str) -> list[Fraction]:
    """The weights, as written in decimal, divided by their sum. Raises Refused where they are no proportions."""
    for weight in weights:
        if not 0 <= weight < math.inf:
            raise Refused(f"{where} has the weight {weight}; weights are numbers from 0 up.")
    exact = [Fraction(repr(weight)) for weight in weights]
    total = sum(exact)
    if total == 0:
        raise Refused(f"{where} has no weight above 0, so there is nothing to train on.")
    shares = [weight / total for weight in exact]
    period = math.lcm(*(share.denominator for share in shares))
    if period > LONGEST_PERIOD:
        raise Refused(
            f"{where} has weights whose order repeats only after {period} windows; write them with fewer digits, so "
            f"that it does after {LONGEST_PERIOD}."
        )
    return shares


def check_weights(weights: Weights, names: Sequence[str], where: str) -> None:
    """Raises Refused where `weights` are not those of the sources `names`, each of them."""
    for name in weights:
        if name not in names:
            raise Refused(unknown_choice(f"a source in {where}", name, names))
    missing = [name for name in names if name not in weights]
    if missing:
        raise Refused(f"{where} leaves out {', '.join(missing)}; give each source a weight, 0 for none.")
    exact_shares(list(weights.values()), where)


def refuse_other_tokenizers(sources: Mapping[str, Source]) -> None:
    """Raises Refused where two of them hold text whose ids mean different things."""
    texts = [(name, source.tokenizer) for name, source in sources.items() if source.tokenizer is not None]
    for name, tokenizer in texts[1:]:
        first, reference = texts[0]
        if tokenizer != reference:
            raise Refused(
                f"{name} was prepared with another tokenizer than {first}, so that their ids mean different things; "
                "prepare both with one."
            )
