"""The learning rate over a run: linear warm-up, a plateau, a decay.

Cosine (SGDR, arXiv 1608.03983) and warm-up–stable–decay (MiniCPM, arXiv 2404.06395) are one family: they differ in the
fraction of the run that decays and in the curve it follows, so a schedule is three numbers and a curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

Curve = Literal["linear", "cosine", "sqrt"]

# What is left of the way from 1 down to `final` once a fraction x of the decay has passed; 1 at 0, 0 at 1.
CURVES: Mapping[Curve, Callable[[float], float]] = {
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
    "sqrt": lambda x: 1.0 - math.sqrt(x),
}


@dataclass(frozen=True)
class Schedule:
    """A factor on the learning rate as a pure function of the step.

    warmup_steps: updates of linear warm-up; update 0 already has 1 / warmup_steps, update warmup_steps - 1 has 1.
    decay_fraction: the last part of the run, as a fraction of all its updates, that decays; 1 decays from the end of
        the warm-up, 0 never.
    curve: how it decays ("sqrt" is 1 - sqrt, arXiv 2405.18392).
    final: the factor at the end of the decay, which the update after the last would have.

    Raises ValueError for a number out of its range.
    """

    warmup_steps: int = 0
    decay_fraction: float = 1.0
    curve: Curve = "cosine"
    final: float = 0.1

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps is {self.warmup_steps}; it counts updates, so give 0 or more")
        if not 0.0 <= self.decay_fraction <= 1.0:
            raise ValueError(f"decay_fraction is {self.decay_fraction}; give a fraction of the run between 0 and 1")
        if not 0.0 <= self.final <= 1.0:
            raise ValueError(f"final is {self.final}; give a factor between 0 and 1")
        if self.curve not in CURVES:
            raise ValueError(f"curve is {self.curve!r}; choose one of {', '.join(CURVES)}")

    def rate(self, step: int, total_steps: int) -> float:
        """The factor, in (0, 1] or at `final`, of update `step` (from 0) in a run of `total_steps` updates."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        decay_start = max(self.warmup_steps, total_steps - round(self.decay_fraction * total_steps))
        if step < decay_start or self.decay_fraction == 0.0:
            return 1.0
        if step >= total_steps:
            return self.final
        passed = (step - decay_start) / (total_steps - decay_start)
        return self.final + (1.0 - self.final) * CURVES[self.curve](passed)
