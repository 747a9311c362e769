"""Which window of which source each sample of a run is.

A run is cut into *legs*, each with one sequence length and one set of weights. `Interleave` says which source each
window of a leg comes from. Each source is read on its own: it runs through its epochs in its own order, and goes on
across the border of a leg where it stood, at the next whole window of the new length. So nothing of a source comes
twice in one of its epochs, whatever the weights do; and because a leg knows only those before it, a later leg changes
nothing.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from conf.schema import Refused
from data.interleave import Interleave
from data.mixture import Mixture, Weights
from data.source import Window


@dataclass(frozen=True)
class Leg:
    """Consecutive samples of one sequence length and one set of weights; None: those of the mixture."""

    sequence_length: int
    num_samples: int
    weights: Weights | None = None


class Course:
    """The samples of a run, counted from its start.

    A pure function of the mixture's fingerprint, the seed, and the legs up to the sample.
    seed: with which it will be read. Raises Refused where a source that has a share has no window of a leg's length.
    """

    num_tokens: int | None = None

    def __init__(self, mixture: Mixture, legs: Sequence[Leg], seed: int) -> None:
        self.vocab = mixture.vocab
        self.fingerprint = mixture.fingerprint
        self.names = list(mixture.sources)
        self._sources = list(mixture.sources.values())
        self._legs: list[_Placed] = []
        for sequence_length, num_samples, shares in _joined(mixture, legs):
            begin = self._legs[-1].end() if self._legs else _Standing.start(len(shares))
            self._legs.append(_Placed(begin, sequence_length, num_samples, shares))
            for name, share in zip(self.names, shares, strict=True):
                if share:
                    _check_length(mixture, name, sequence_length, seed)

    def window(self, index: int, sequence_length: int, lookahead: int, seed: int) -> Window:
        """Sample `index`. Raises ValueError where the run has none of that length there."""
        leg = self._leg(index)
        if leg.sequence_length != sequence_length or index >= leg.begin.samples + leg.num_samples:
            raise ValueError(f"sample {index} of {sequence_length} tokens is none of this run")
        which, rank = leg.order.place(index - leg.begin.samples)
        return self._sources[which].window(leg.first_window[which] + rank, sequence_length, lookahead, seed)

    def consumed(self, num_samples: int) -> dict[str, int]:
        """Windows of each source among the first samples of the run."""
        leg = self._leg(num_samples)
        counts = zip(leg.begin.windows, leg.order.counts(num_samples - leg.begin.samples), strict=True)
        return dict(zip(self.names, map(sum, counts), strict=True))

    def _leg(self, index: int) -> _Placed:
        return self._legs[bisect_right(self._legs, index, key=lambda leg: leg.begin.samples) - 1]


@dataclass(frozen=True)
class _Standing:
    """What lies behind a place in a run. samples: in all.

    windows, at, owed: of each source, how many were taken, the token up to which it was read, and by how many tokens it
    is behind its share.
    """

    samples: int
    windows: list[int]
    at: list[int]
    owed: list[Fraction]

    @staticmethod
    def start(num_sources: int) -> _Standing:
        return _Standing(0, [0] * num_sources, [0] * num_sources, [Fraction(0)] * num_sources)


class _Placed:
    """A leg and where it begins."""

    def __init__(self, begin: _Standing, sequence_length: int, num_samples: int, shares: list[Fraction]) -> None:
        self.begin, self.sequence_length, self.num_samples = begin, sequence_length, num_samples
        self.shares = shares
        # the rest of a window of another length is left out: a window that reached back would repeat tokens
        self.first_window = [-(-tokens // sequence_length) for tokens in begin.at]
        self.order = Interleave(shares, [tokens / sequence_length for tokens in begin.owed], num_samples)

    def end(self) -> _Standing:
        """Behind the leg."""
        n, S, begin = self.num_samples, self.sequence_length, self.begin
        windows, at, owed = [], [], []
        for i, count in enumerate(self.order.counts(n)):
            windows.append(begin.windows[i] + count)
            at.append((self.first_window[i] + count) * S if count else begin.at[i])
            owed.append(begin.owed[i] + S * (n * self.shares[i] - count))
        return _Standing(begin.samples + n, windows, at, owed)


def _check_length(mixture: Mixture, name: str, sequence_length: int, seed: int) -> None:
    try:
        mixture.sources[name].window(0, sequence_length, 1, seed)
    except Refused as refusal:
        where = f"data.train.{name}" if len(mixture.sources) > 1 else "data.train"
        raise Refused(f"{where}: {refusal}") from None


def _joined(mixture: Mixture, legs: Sequence[Leg]) -> list[tuple[int, int, list[Fraction]]]:
    """Neighbours alike made one, so that the order does not begin anew where only the batch size changes."""
    joined: list[tuple[int, int, list[Fraction]]] = []
    for leg in legs:
        length, num_samples, shares = leg.sequence_length, leg.num_samples, mixture.shares(leg.weights)
        if joined and (joined[-1][0], joined[-1][2]) == (length, shares):
            num_samples += joined.pop()[1]
        joined.append((length, num_samples, shares))
    return joined
