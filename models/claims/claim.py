"""A claim, and what measuring made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Verdict = Literal["reproduced", "refuted", "true under an assumption", "untestable here", "to be measured"]


@dataclass(frozen=True)
class Judgement:
    """number: the one that decides, in a few words. paragraph: what was measured and what follows. assumption: under
    which the claim holds, or would hold. measured: the numbers themselves, by name. table: rows, the first of titles.
    """

    verdict: Verdict
    number: str
    paragraph: str
    assumption: str = ""
    measured: Mapping[str, float] = field(default_factory=dict)
    table: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Claim:
    """said: the claim in its own words. shown_by: commands that print its numbers, without `python -m models`."""

    number: int
    said: str
    judge: Callable[[], Judgement]
    shown_by: tuple[str, ...] = ()
