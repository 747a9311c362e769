"""Which of several sources each window of a stretch comes from: shares kept at every prefix, nothing drawn.

The chairman assignment problem (Tijdeman, Discrete Mathematics 32, 1980): source i is to have w_i of every window, but
a window is of one source. Its next window is *ready* where taking it puts the source at most δ windows ahead of its
share, and *due* where leaving it out would put the source more than δ behind. What is due is taken, else the ready one
that is due soonest. With δ = 1 − 1/(2k − 2) for k sources at most one is ever due, and no source is further than δ from
its share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray


class Interleave:
    """The order in which windows of equal length are taken from sources in proportion to their weights.

    weights: not negative, summing to 1; a source of weight 0 gets nothing.
    owed:    by how many windows each source is behind its share at the start, negative where ahead; they sum to 0.
    num_windows: how many will ever be asked for.

    What is owed is made up for. Then several sources may be due at once; the one furthest behind is taken, and another
    can fall more than δ behind until its turn: never among two sources, and by fractions of a window among more.
    """

    def __init__(self, weights: Sequence[Fraction], owed: Sequence[Fraction], num_windows: int) -> None:
        self.weights = list(weights)
        self.period = math.lcm(*(weight.denominator for weight in weights))
        self._owed = list(owed)
        self._source, self._rank, self._cycle = self._take(num_windows)
        self._again = self._totals(self._cycle, len(self._source))

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
        """Rounds of the cycle before n, and the place in the table where n then lies."""
        if n <= self._cycle:
            return 0, n
        rounds, at = divmod(n - self._cycle, max(1, len(self._source) - self._cycle))
        return rounds, self._cycle + at

    def _totals(self, begin: int, end: int) -> list[int]:
        return np.bincount(self._source[begin:end], minlength=len(self.weights)).tolist()

    def _take(self, num_windows: int) -> tuple[NDArray[np.int16], NDArray[np.int64], int]:
        """The sources of the first windows, the rank of each among its own, and from where on the table repeats.

        After a period every share is whole, so that what is owed differs from the start by whole windows: once it is
        what it was after an earlier period, the order repeats.
        """
        active = [i for i, weight in enumerate(self.weights) if weight > 0]
        delta = 1 - Fraction(1, max(1, 2 * len(active) - 2))
        plans = {i: _Plan.of(self.weights[i], self._owed[i], delta) for i in active}
        counts = [0] * len(self.weights)
        ready = {i: plan.ready(0) for i, plan in plans.items()}
        due = {i: plan.due(0) for i, plan in plans.items()}

        def behind(n: int, i: int) -> Fraction:
            return (n + 1) * self.weights[i] + self._owed[i] - counts[i]

        order: list[int] = []
        ranks: list[int] = []
        after_periods: dict[tuple[int, ...], int] = {}
        for n in range(num_windows):
            if n % self.period == 0:
                ahead = tuple(count - int(n * weight) for count, weight in zip(counts, self.weights, strict=True))
                if ahead in after_periods:
                    return np.array(order, np.int16), np.array(ranks, np.int64), after_periods[ahead]
                after_periods[ahead] = n
            must = [i for i in plans if due[i] <= n]
            may = must or [i for i in plans if ready[i] <= n]
            if len(may) == 1:
                chosen = may[0]
            elif may and not must:
                chosen = min(may, key=due.__getitem__)
            else:
                chosen = max(may or plans, key=lambda i, n=n: behind(n, i))
            order.append(chosen)
            ranks.append(counts[chosen])
            counts[chosen] += 1
            ready[chosen], due[chosen] = plans[chosen].ready(counts[chosen]), plans[chosen].due(counts[chosen])
        return np.array(order, np.int16), np.array(ranks, np.int64), len(order)


@dataclass(frozen=True)
class _Plan:
    """When a source may and must be taken, in whole numbers, because fractions are slow: x / scale is meant."""

    scale: int
    between: int
    first_ready: int
    first_due: int

    @staticmethod
    def of(weight: Fraction, owed: Fraction, delta: Fraction) -> _Plan:
        exact = (1 / weight, (1 - delta - owed) / weight, (delta - owed) / weight)
        scale = math.lcm(*(number.denominator for number in exact))
        between, first_ready, first_due = (int(number * scale) for number in exact)
        return _Plan(scale, between, first_ready, first_due)

    def ready(self, count: int) -> int:
        """The first place at which the source's window `count` may stand."""
        return -(-(count * self.between + self.first_ready) // self.scale) - 1

    def due(self, count: int) -> int:
        """The last."""
        return (count * self.between + self.first_due) // self.scale
