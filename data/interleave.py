"""Which of several sources each window of a leg comes from: shares kept at every prefix, nothing drawn.

The chairman assignment problem (Tijdeman, Discrete Mathematics 32, 1980): source i is to have w_i of every window, but
a window is of one source, and the weights may change from leg to leg. Its next window is *ready* where taking it puts
the source at most δ windows ahead of its share, and *due* where leaving it out would put the source more than δ behind.
What is due is taken, else the ready one that is due soonest. With δ = 1 − 1/(2k − 2) for k sources at most one is ever
due, and no source is further than δ from its share.

When a window is due may depend on weights that lie ahead, and without a look at them no order keeps within a window: of
k sources alike, those that are passed over are what counts next, and with weights 1/k, 1/(k − 1), …, 1/2 for those the
last is 1/2 + 1/3 + … + 1/k windows behind, more than one from k = 4 on.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray


class Interleave:
    """The order in which a leg's windows are taken from sources in proportion to their weights.

    weights: not negative, summing to 1.
    owed:    by how many windows each source is behind its share at the start, negative where ahead.
    num_windows: how many will ever be asked for.
    ahead:   how many windows each leg behind this one has, and its weights; the last is taken to have no end.
    among:   the sources that have a share in one of these legs, or had one in an earlier leg that they continue; None:
             in one of these.
    barred:  those of them that have no window to give in this leg, in which they have no share.

    A decision depends on what is owed and what lies ahead alone, so that an order made anew from any place, with what
    is owed there, goes on alike. A source whose weight falls to 0 may still get a window that it is owed.

    What is owed at the start is made up for. Where no such order left it behind (what lay ahead became another), or
    where a source that is owed a window is barred, several may be due at once, or none be ready; the one furthest
    behind is taken, and others can get further than δ from their share: never among two sources, and by fractions of a
    window among more.
    """

    def __init__(
        self,
        weights: Sequence[Fraction],
        owed: Sequence[Fraction],
        num_windows: int,
        ahead: Sequence[tuple[int, Sequence[Fraction]]] = (),
        among: Sequence[int] | None = None,
        barred: Sequence[int] = (),
    ) -> None:
        self.weights = list(weights)
        self._owed, self._num_windows, self._ahead = list(owed), num_windows, list(ahead)
        if among is None:
            among = [i for i, w in enumerate(weights) if w > 0 or any(shares[i] > 0 for _, shares in ahead)]
        self._delta = 1 - Fraction(1, max(1, 2 * len(among) - 2))
        self._plans = {i: _plan(self.weights[i], self._owed[i], self._delta) for i in among if i not in barred}
        # of the table, windows [begin, begin + length) come `rounds` times more before those behind them
        self._begin, self._length, self._rounds, self._again = 0, 1, 0, [0] * len(self.weights)
        self._source, self._rank = self._take()

    def place(self, n: int) -> tuple[int, int]:
        """The source of window n, and how many windows before n are of that source."""
        rounds, at = self._wrap(n)
        source = int(self._source[at])
        return source, int(self._rank[at]) + rounds * self._again[source]

    def counts(self, n: int) -> list[int]:
        """How many of the first n windows are of each source."""
        rounds, at = self._wrap(n)
        return [count + rounds * again for count, again in zip(self._totals(0, at), self._again, strict=True)]

    def _wrap(self, n: int) -> tuple[int, int]:
        """Repetitions before n, and the place in the table where n then lies."""
        rounds = max(0, min((n - self._begin) // self._length, self._rounds))
        return rounds, n - rounds * self._length

    def _totals(self, begin: int, end: int) -> list[int]:
        return np.bincount(self._source[begin:end], minlength=len(self.weights)).tolist()

    def _take(self) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
        """The table: the source of each window, and its rank among that source's own.

        After a period every share is whole, so that what is owed differs from the start by whole windows: once it is
        what it was after an earlier period, the order repeats, up to where a window is due behind the leg.
        """
        period = math.lcm(*(weight.denominator for weight in self.weights))
        turns = _Turns(self.weights, self._owed, self._plans, self._due)
        order: list[int] = []
        ranks: list[int] = []
        after_periods: dict[tuple[int, ...], int] = {}
        repeated = [0] * len(self.weights)
        n = 0
        while n < self._num_windows:
            if n % period == 0 and not self._rounds:
                begin = after_periods.setdefault(turns.ahead(n), n)
                rounds = self._repeats(begin, n, turns.sight) if begin < n else 0
                if rounds > 0:
                    again = np.bincount(order[begin:n], minlength=len(self.weights)).tolist()
                    self._begin, self._length, self._rounds, self._again = begin, n - begin, rounds, again
                    if not self._ahead:
                        break
                    n += rounds * self._length
                    repeated = [rounds * count for count in again]
                    turns.skip(repeated)
                    continue
            chosen = turns.choose(n)
            order.append(chosen)
            ranks.append(turns.counts[chosen] - repeated[chosen])
            turns.take(chosen, n)
            n += 1
        return np.array(order, np.int16), np.array(ranks, np.int64)

    def _repeats(self, begin: int, end: int, sight: float) -> int:
        """How often windows [begin, end) may come again behind `end`: `sight` before the leg's end, what lies behind it
        may decide."""
        return sys.maxsize if not self._ahead else int(self._num_windows - sight - end) // (end - begin)

    def _due(self, i: int, count: int) -> float:
        """The last place at which window `count` of source i may stand, counted from this leg's first window."""
        here = self._plans[i].due(count)
        if here < self._num_windows or not self._ahead:
            return here
        place, slack = self._num_windows, count + self._delta - self._owed[i] - self._num_windows * self.weights[i]
        slack = max(slack, Fraction(0))  # of a source without a share here: overdue once it has one again
        for num_windows, weights in self._ahead[:-1]:
            if slack < num_windows * weights[i]:
                return place + slack // weights[i]
            place, slack = place + num_windows, slack - num_windows * weights[i]
        last = self._ahead[-1][1][i]
        return place + slack // last if last else math.inf


class _Turns:
    """Whose turn it is. counts: windows that each source has had. sight: how far behind a place another may be due."""

    def __init__(
        self,
        weights: Sequence[Fraction],
        owed: Sequence[Fraction],
        plans: Mapping[int, _Plan | _Pause],
        due: Callable[[int, int], float],
    ) -> None:
        self._weights, self._owed, self._plans, self._last_place = weights, owed, plans, due
        self._sharing = [i for i in plans if weights[i] > 0]
        self.counts = [0] * len(weights)
        self.sight = max(plans[i].due(0) for i in self._sharing)
        self._ready: dict[int, float] = {}
        self._due: dict[int, float] = {}
        self._look(*plans)

    def choose(self, n: int) -> int:
        """The source of window n."""
        must = [i for i, place in self._due.items() if place <= n]
        may = must or [i for i, place in self._ready.items() if place <= n]
        if len(may) == 1:
            return may[0]
        if may and not must:
            return min(may, key=self._due.__getitem__)
        return max(may or self._sharing, key=lambda i: (n + 1) * self._weights[i] + self._owed[i] - self.counts[i])

    def take(self, i: int, n: int) -> None:
        """Window n is of source i."""
        self.counts[i] += 1
        self._look(i)
        if self._weights[i]:
            self.sight = max(self.sight, self._plans[i].due(self.counts[i]) - n)

    def skip(self, counts: Sequence[int]) -> None:
        """Each source has had so many more."""
        self.counts = [count + more for count, more in zip(self.counts, counts, strict=True)]
        self._look(*self._plans)

    def ahead(self, n: int) -> tuple[int, ...]:
        """By how many windows each source is ahead of its share after n, from which alone the order follows."""
        return tuple(count - int(n * weight) for count, weight in zip(self.counts, self._weights, strict=True))

    def _look(self, *sources: int) -> None:
        for i in sources:
            self._ready[i] = self._plans[i].ready(self.counts[i])
            self._due[i] = self._last_place(i, self.counts[i])


def _plan(weight: Fraction, owed: Fraction, delta: Fraction) -> _Plan | _Pause:
    if not weight:
        return _Pause(owed + delta)
    exact = (1 / weight, (1 - delta - owed) / weight, (delta - owed) / weight)
    scale = math.lcm(*(number.denominator for number in exact))
    between, first_ready, first_due = (int(number * scale) for number in exact)
    return _Plan(scale, between, first_ready, first_due)


@dataclass(frozen=True)
class _Plan:
    """When a source may and must be taken, in whole numbers, because fractions are slow: x / scale is meant."""

    scale: int
    between: int
    first_ready: int
    first_due: int

    def ready(self, count: int) -> float:
        """The first place at which the source's window `count` may stand."""
        return -(-(count * self.between + self.first_ready) // self.scale) - 1

    def due(self, count: int) -> float:
        """The last, were the leg endless."""
        return (count * self.between + self.first_due) // self.scale


@dataclass(frozen=True)
class _Pause:
    """The same of a source that has no share. most: windows that it may have."""

    most: Fraction

    def ready(self, count: int) -> float:
        return 0 if count + 1 <= self.most else math.inf

    def due(self, count: int) -> float:
        return math.inf
