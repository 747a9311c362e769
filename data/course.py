"""Which window of which source each sample of a run is.

A run is cut into *legs*, each with one sequence length and one set of weights, which are shares of its windows.
`Interleave` says which source each window comes from, and looks ahead over the legs that follow, so that every source
stays within one window of its share from the first sample to the last, whatever changes on the way. (A window is one
whatever its length: what a source is behind where the length changes is made up for in windows of the new one. No order
is known that would keep within one window in tokens, too.)

Each source is read on its own: it runs through its epochs in its own order (`data/shuffle.py`), and goes on across the
border of a leg where it stood; at a new length, with the first whole window behind the block that it was in. So nothing
of a source comes twice in one of its epochs, whatever the weights do. A run that is resumed starts from its `Standing`,
so that this holds too where the legs ahead are no longer those that it looked at.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from conf.schema import Refused
from data.interleave import Interleave
from data.mixture import Mixture, Weights
from data.shuffle import Shuffle
from data.source import Source, Window


@dataclass(frozen=True)
class Leg:
    """Consecutive samples of one sequence length and one set of weights; None: those of the mixture."""

    sequence_length: int
    num_samples: int
    weights: Weights | None = None


@dataclass(frozen=True)
class Place:
    """Where a source stands: `taken` windows of `sequence_length` tokens read, from window `origin` on."""

    sequence_length: int
    origin: int
    taken: int


@dataclass(frozen=True)
class Standing:
    """What lies behind a place in a run. samples: in all.

    windows, places, owed: of each source, how many were taken, where it stands, None where nothing of it was read, and
    by how many windows it is behind its share.
    """

    samples: int
    windows: list[int]
    places: list[Place | None]
    owed: list[Fraction]

    @staticmethod
    def start(num_sources: int) -> Standing:
        return Standing(0, [0] * num_sources, [None] * num_sources, [Fraction(0)] * num_sources)

    def plain(self) -> dict[str, Any]:
        """In numbers and texts, as `read` takes them."""
        places = [place and [place.sequence_length, place.origin, place.taken] for place in self.places]
        owed = [str(windows) for windows in self.owed]
        return {"samples": self.samples, "windows": self.windows, "places": places, "owed": owed}

    @staticmethod
    def read(plain: Mapping[str, Any] | None) -> Standing:
        """Raises Refused where an older version wrote it, or nothing."""
        if plain is None or plain.keys() != Standing.start(0).plain().keys():
            raise Refused(
                "the checkpoint is of an older version, which read the data in another order; "
                "go on with that version, or take its weights alone with train.init in a new run.dir."
            )
        places = [place and Place(*place) for place in plain["places"]]
        return Standing(plain["samples"], plain["windows"], places, [Fraction(text) for text in plain["owed"]])


class Course:
    """The samples of a run, counted from its start.

    A pure function of the mixture's fingerprint, the seed and the legs; from `standing` on, a course of the same legs
    is the same.

    seed: with which it will be read. standing: where it begins; None: at the start of the run.
    Raises Refused where a source that has a share has no window of a leg's length.
    """

    num_tokens: int | None = None

    def __init__(self, mixture: Mixture, legs: Sequence[Leg], seed: int, standing: Standing | None = None) -> None:
        self.vocab = mixture.vocab
        self.tokenizer = mixture.tokenizer
        self.fingerprint = mixture.fingerprint
        self.names = list(mixture.sources)
        self._sources = list(mixture.sources.values())
        self._given = mixture, legs, seed
        self._legs: list[_Placed] = []
        self._begin = begin = standing or Standing.start(len(self.names))
        table = _joined(mixture, legs)
        among = [i for i in range(len(self.names)) if any(shares[i] for _, _, shares in table)]
        barred = _barred(mixture, table, among, seed)
        end = 0
        for at, (sequence_length, num_samples, shares) in enumerate(table, 1):
            end += num_samples
            if begin.samples < end:
                ahead = [(following, weights) for _, following, weights in table[at:]]
                left = end - begin.samples
                order = Interleave(shares, begin.owed, left, ahead, among, barred[sequence_length])
                self._legs.append(_Placed(begin, sequence_length, left, order, self._sources, seed))
                begin = self._legs[-1].standing(end)

    def window(self, index: int, sequence_length: int, lookahead: int, seed: int) -> Window:
        """Sample `index`. Raises ValueError where the course has none of that length there."""
        leg = self._leg(index)
        if leg is None or leg.sequence_length != sequence_length or index >= leg.begin.samples + leg.num_samples:
            raise ValueError(f"sample {index} of {sequence_length} tokens is none of this run")
        which, rank = leg.order.place(index - leg.begin.samples)
        return self._sources[which].window(leg.window(which, rank), sequence_length, lookahead, seed)

    def consumed(self, num_samples: int) -> dict[str, int]:
        """Windows of each source among the first samples of the run."""
        return dict(zip(self.names, self.standing(num_samples).windows, strict=True))

    def standing(self, num_samples: int) -> Standing:
        """What lies behind once so many samples of the run are consumed."""
        leg = self._leg(num_samples)
        if leg is not None:
            return leg.standing(num_samples)
        if num_samples != self._begin.samples:
            raise ValueError(f"sample {num_samples} is none of this run from sample {self._begin.samples} on")
        return self._begin

    def resumed(self, standing: Standing) -> Course:
        """This course from there on."""
        return Course(*self._given, standing)

    def _leg(self, index: int) -> _Placed | None:
        at = bisect_right(self._legs, index, key=lambda leg: leg.begin.samples)
        return self._legs[at - 1] if at else None


class _Placed:
    """A leg, or what is left of it, and where it begins."""

    def __init__(
        self,
        begin: Standing,
        sequence_length: int,
        num_samples: int,
        order: Interleave,
        sources: Sequence[Source],
        seed: int,
    ) -> None:
        self.begin, self.sequence_length, self.num_samples, self.order = begin, sequence_length, num_samples, order
        self._places, self._shuffles = [], []
        for source, place in zip(sources, begin.places, strict=True):
            here = _place(source, place, sequence_length, seed)
            self._places.append(here)
            self._shuffles.append(Shuffle(source, sequence_length, here.origin, seed))

    def window(self, which: int, rank: int) -> int:
        """The index in source `which` of its window that has so many of it before it in this leg."""
        return self._shuffles[which].window(self._places[which].taken + rank)

    def standing(self, samples: int) -> Standing:
        """Within the leg, or at its end."""
        n, begin = samples - self.begin.samples, self.begin
        windows, owed = [], []
        places: list[Place | None] = []
        for i, count in enumerate(self.order.counts(n)):
            here = self._places[i]
            windows.append(begin.windows[i] + count)
            places.append(replace(here, taken=here.taken + count) if count else begin.places[i])
            owed.append(begin.owed[i] + n * self.order.weights[i] - count)
        return Standing(samples, windows, places, owed)


def _place(source: Source, before: Place | None, sequence_length: int, seed: int) -> Place:
    """Where a source stands in windows of this length."""
    if before is None:
        return Place(sequence_length, 0, 0)
    if before.sequence_length == sequence_length:
        return before
    # a window that reached back, or one of the block that was read in part, would repeat tokens
    used = Shuffle(source, before.sequence_length, before.origin, seed).used(before.taken)
    return Place(sequence_length, -(-used // sequence_length), 0)


def _barred(
    mixture: Mixture, table: Sequence[tuple[int, int, list[Fraction]]], among: Sequence[int], seed: int
) -> dict[int, list[int]]:
    """By sequence length, the sources that have no window of it. Raises Refused where one of them has a share there."""
    barred: dict[int, list[int]] = {length: [] for length, _, _ in table}
    for length, without in barred.items():
        for i in among:
            name, source = list(mixture.sources.items())[i]
            try:
                _check_length(source, length, seed)
            except Refused as refusal:
                if any(shares[i] for of_leg, _, shares in table if of_leg == length):
                    where = f"data.train.{name}" if len(mixture.sources) > 1 else "data.train"
                    raise Refused(f"{where}: {refusal}") from None
                without.append(i)
    return barred


def _check_length(source: Source, sequence_length: int, seed: int) -> None:
    if source.num_tokens is not None and source.num_tokens < sequence_length:  # else it would meet itself in a window
        raise Refused(
            f"it has {source.num_tokens:,} tokens, fewer than a sequence of {sequence_length:,}; "
            "set a shorter train.sequence_length, or give it more text."
        )
    source.window(0, sequence_length, 1, seed)


def _joined(mixture: Mixture, legs: Sequence[Leg]) -> list[tuple[int, int, list[Fraction]]]:
    """Neighbours alike made one, so that the order does not begin anew where only the batch size changes."""
    joined: list[tuple[int, int, list[Fraction]]] = []
    for leg in legs:
        length, num_samples, shares = leg.sequence_length, leg.num_samples, mixture.shares(leg.weights)
        if joined and (joined[-1][0], joined[-1][2]) == (length, shares):
            num_samples += joined.pop()[1]
        joined.append((length, num_samples, shares))
    return joined
