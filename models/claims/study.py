"""The claim that only training can judge, from the results of a study of small models."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from conf import schema
from models.claims.claim import Judgement

RESULTS = Path(schema.__file__).parent.parent / "docs" / "compression_study.json"
"""{"command": how it was made, "arms": [{"arm": a name, "ratio": 1 to 16, "losses": [held-out nats, one a seed]}]},
with one arm of ratio 1: the same backbone with as many parameters, uncompressed."""

CLAIMED = (4.0, 8.0)


@dataclass(frozen=True)
class Arm:
    """losses: of held-out text, in nats a token, one a seed."""

    arm: str
    ratio: float
    losses: list[float]


@dataclass(frozen=True)
class Results:
    """command: how they were made. arms: one of ratio 1, which is compared with, and others."""

    command: str
    arms: list[Arm]

    def __post_init__(self) -> None:
        if [arm.ratio for arm in self.arms].count(1.0) != 1:
            raise ValueError("arms needs one of ratio 1, with which the others are compared")
        if not any(CLAIMED[0] <= arm.ratio <= CLAIMED[1] for arm in self.arms):
            raise ValueError("arms needs one of a ratio between 4 and 8, of which the claim speaks")
        if any(arm.ratio < 1 for arm in self.arms):
            raise ValueError("a ratio is at least 1")
        if few := [arm.arm for arm in self.arms if len(arm.losses) < 3]:
            raise ValueError(f"arm {few[0]} needs the losses of at least three seeds")


def ratio_of_compression(path: Path = RESULTS) -> Judgement:
    """Claim 9. A spike is a rise of perplexity by more than 1 %, and of the loss by more than two standard deviations
    of a seed, pooled over the two arms. Raises Refused for results that are not of that form."""
    if not path.exists():
        return Judgement(
            "to be measured",
            "–",
            "Loss against ratio, from 1× to 16×, with as many parameters and at least three seeds, is what decides; a "
            "spike is more than two standard deviations and more than 1 % of perplexity. The first pass of the study "
            "(`docs/study.md`) has two seeds of the per-head latent, and is too short to judge by.",
        )
    try:
        read = json.loads(path.read_text())
    except ValueError as error:
        raise schema.Refused(f"{path.name} is no JSON ({error}); write the study's results anew.") from None
    results = schema.build(Results, read, path.name)
    (base,) = (arm for arm in results.arms if arm.ratio == 1)
    measured: dict[str, float] = {}
    spikes: list[Arm] = []
    rows: list[tuple[str, ...]] = [("arm", "ratio", "loss", "perplexity", "standard deviations", "spike")]
    for arm in sorted(results.arms, key=lambda arm: arm.ratio):
        rise = mean(arm.losses) - mean(base.losses)
        spread = math.sqrt((stdev(arm.losses) ** 2 + stdev(base.losses) ** 2) / 2)
        percent, deviations = 100 * math.expm1(rise), rise / spread if spread else math.copysign(math.inf, rise)
        spike = percent > 1 and deviations > 2
        if spike and CLAIMED[0] <= arm.ratio <= CLAIMED[1]:
            spikes.append(arm)
        shown = (
            ("–", "–", "–") if arm is base else (f"{percent:+.2f} %", f"{deviations:+.1f}", "yes" if spike else "no")
        )
        rows.append((arm.arm, f"{arm.ratio:g}×", f"{mean(arm.losses):.4f}", *shown))
        measured[f"{arm.ratio:g}× percent"] = percent
    claimed = [arm for arm in results.arms if CLAIMED[0] <= arm.ratio <= CLAIMED[1]]
    worst = max(mean(arm.losses) - mean(base.losses) for arm in claimed)
    return Judgement(
        "reproduced" if not spikes else "refuted" if len(spikes) == len(claimed) else "true under an assumption",
        f"{len(spikes)} of {len(claimed)} ratios from 4× to 8× spike, at most {100 * math.expm1(worst):+.1f} % of "
        "perplexity",
        f"Against the uncompressed arm ({mean(base.losses):.4f} nats, {len(base.losses)} seeds), perplexity on "
        f"held-out text rises by at most {100 * math.expm1(worst):.1f} % at 4× to 8×. Small models on little text: "
        f"this says how the scheme behaves there. Trained by `{results.command}`.",
        "the ratio is one of those without a spike" if spikes else "",
        measured,
        tuple(rows),
    )
