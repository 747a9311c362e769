"""Differences between arms, paired by seed: one seed gives every arm the same data in the same order, so that what the
draw of the data does to all arms alike is not in the difference."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from launch.study.results import Results, Run

Value = Callable[[Run], float | None]

NOISE = 2.0
"""Standard errors up to which a difference is called within noise."""

QUANTILES = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
"""Student's t, two-sided 95 %, by degrees of freedom; beyond the table, that of ten."""


@dataclass(frozen=True)
class Difference:
    """values: by seed. sd: sample standard deviation, None of one seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def sd(self) -> float | None:
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def error(self) -> float | None:
        """Of the mean, one standard error."""
        return None if self.sd is None else self.sd / math.sqrt(len(self.values))

    @property
    def quantile(self) -> float:
        """Standard errors beyond which chance would take the mean less than one time in twenty."""
        return QUANTILES.get(len(self.values) - 1, 2.23)

    @property
    def verdict(self) -> str:
        """In words. A single seed tells nothing about noise."""
        if self.error is None:
            return "one seed"
        if abs(self.mean) <= NOISE * self.error:
            return "within noise"
        return "beyond 95 %" if abs(self.mean) > self.quantile * self.error else f"beyond {NOISE:g} s.e."


def paired(results: Results, arm: str, against: str, value: Value) -> Difference | None:
    """arm − against, over the seeds that both have; None without one."""
    return combined(results, {arm: 1, against: -1}, value)


def interaction(results: Results, neither: str, first: str, second: str, both: str, value: Value) -> Difference | None:
    """What both changes do together beyond what each does alone: (both − second) − (first − neither), by seed."""
    return combined(results, {both: 1, second: -1, first: -1, neither: 1}, value)


def combined(results: Results, signs: Mapping[str, int], value: Value) -> Difference | None:
    """The sum of the arms' values with these signs, by seed."""
    if len(signs) < 2:
        return None
    runs = {arm: results.by_seed(arm) for arm in signs}
    sums = []
    for seed in sorted(set.intersection(*(set(by_seed) for by_seed in runs.values()))):
        terms = [(sign, value(runs[arm][seed])) for arm, sign in signs.items()]
        known = [sign * term for sign, term in terms if term is not None]
        if len(known) == len(terms):
            sums.append(math.fsum(known))
    return Difference(tuple(sums)) if sums else None


def text_loss(run: Run) -> float | None:
    """Bits per byte on the first held-out text."""
    return next((source["bpb"] for source in run.sources.values() if source.get("bpb") is not None), None)


def recall(pairs: int) -> Value:
    """The share of answers that are right where a window holds so many pairs."""

    def value(run: Run) -> float | None:
        found = [s["accuracy"] for s in run.sources.values() if _pairs(s) == pairs]
        return found[0] if found else None

    return value


def pairs_asked(runs: Sequence[Run]) -> list[int]:
    """The numbers of pairs at which recall was asked for, ascending."""
    return sorted({p for run in runs for source in run.sources.values() if (p := _pairs(source)) is not None})


def _pairs(source: Mapping[str, object]) -> int | None:
    """Of key and value that a window of a synthetic task holds: recall's pairs, or needles."""
    facts = source.get("facts") or {}
    assert isinstance(facts, Mapping)
    return facts.get("pairs", facts.get("keys"))
