"""The claim that only training can judge, from what the study of small models wrote (`python -m launch study`)."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from conf import schema
from models.claims.claim import Judgement, Verdict

RESULTS = Path(schema.__file__).parent.parent / "docs" / "study" / "study.json"

CURVE = "per-head latent"
"""What the study calls the arms that are one latent a head, at several ratios."""
UNNORMED = ("gqa_no_qk_norm", "gqa")
"""Two arms that differ in QK-norm alone, which the latents cannot have and the baseline has."""
CLAIMED = (4.0, 8.0)
SEEDS = 3


@dataclass(frozen=True)
class Source:
    """loss: nats a token, null where it was no number. bpb: bits per byte, null where the source is no text."""

    loss: float | None
    bpb: float | None


@dataclass(frozen=True)
class Run:
    """One that came to its end. sources: held out, by name."""

    arm: str
    seed: int
    tokens: int
    sources: dict[str, Source]
    machine: str
    torch: str

    @property
    def text(self) -> Source | None:
        """The first held-out text."""
        return next((source for source in self.sources.values() if source.bpb is not None), None)


@dataclass(frozen=True)
class CacheSize:
    """measured: bytes that are allocated for `context` tokens."""

    context: int
    measured: float

    def __post_init__(self) -> None:
        if self.measured <= 0:
            raise ValueError(f"measured is {self.measured:g}, but a cache has bytes")


@dataclass(frozen=True)
class Arm:
    """looked_up: of the total, in tables of which a token takes a row. off: parameters more than the anchor's, which
    each arm is matched to."""

    total: int
    looked_up: int
    off: int
    cache: CacheSize


@dataclass(frozen=True)
class Tuning:
    """key: of the setting that trials chose for each arm by itself."""

    key: str


@dataclass(frozen=True)
class Study:
    """baseline: the arm that others are compared with. curves: by name, arms that are one scheme at several ratios."""

    baseline: str
    curves: dict[str, list[str]]
    tuning: Tuning | None = None


@dataclass(frozen=True)
class Results:
    """What the claim needs of a study's file, which holds more."""

    study: Study
    arms: dict[str, Arm]
    runs: list[Run]

    def __post_init__(self) -> None:
        if missing := {self.study.baseline, *self.compressed} - set(self.arms):
            raise ValueError(f"arms has no {min(missing)}, which the study names")

    @property
    def compressed(self) -> list[str]:
        """The arms that the claim speaks of, at whatever ratio."""
        return self.study.curves.get(CURVE, [])

    def ratio(self, arm: str) -> float:
        """The baseline's cache ÷ the arm's."""
        return self.arms[self.study.baseline].cache.measured / self.arms[arm].cache.measured

    def text(self, arm: str) -> list[Source]:
        """Of each seed whose loss is a number."""
        by_seed = {run.seed: run.text for run in self.runs if run.arm == arm}
        return [text for text in by_seed.values() if text is not None and text.loss is not None]


@dataclass(frozen=True)
class Losses:
    """An arm's, one a seed, in nats a token and in bits per byte."""

    arm: str
    ratio: float
    nats: list[float]
    bits: list[float]

    @property
    def claimed(self) -> bool:
        return CLAIMED[0] <= round(self.ratio, 1) <= CLAIMED[1]

    def percent(self, base: Losses) -> float:
        """Of perplexity, more than `base` has."""
        return 100 * math.expm1(mean(self.nats) - mean(base.nats))

    def deviations(self, base: Losses) -> float:
        """Of a seed, pooled over both arms, by which the loss is above that of `base`."""
        rise, spread = mean(self.nats) - mean(base.nats), math.hypot(stdev(self.nats), stdev(base.nats)) / math.sqrt(2)
        return rise / spread if spread else math.copysign(math.inf, rise)

    def spikes(self, base: Losses) -> bool | None:
        """None where the seeds differ too much to tell."""
        return False if self.percent(base) <= 1 else True if self.deviations(base) > 2 else None


def ratio_of_compression(path: Path = RESULTS) -> Judgement:
    """Claim 9. A spike is a rise of perplexity by more than 1 %, and of the loss by more than two standard deviations
    of a seed, pooled over the two arms; a rise by more than 1 % within those decides nothing. Raises Refused for a file
    that is not a study's."""
    if not path.exists():
        return _to_be_measured("Nothing is there yet: no results of a study.")
    try:
        read = json.loads(path.read_text())
    except ValueError as error:
        raise schema.Refused(f"{path.name} is no JSON ({error}); write the study's results anew.") from None
    results = schema.build(Results, _needed(Results, read), path.name)
    base, *arms = (_losses(results, arm) for arm in (results.study.baseline, *results.compressed))
    arms.sort(key=lambda arm: arm.ratio)
    claimed = [arm for arm in arms if arm.claimed]
    if not claimed:
        return _to_be_measured("Nothing is there yet: the study has no latent a head at 4× to 8×.")
    if any(len(arm.nats) < SEEDS for arm in (base, *arms)):
        seeds = ", ".join(f"`{arm.arm}` {len(arm.nats)} at {arm.ratio:.3g}×" for arm in (base, *arms))
        return _to_be_measured(f"So far there are seeds of: {seeds}.")

    spikes = [arm.spikes(base) for arm in claimed]
    verdict, assumption = _verdict(claimed, spikes)
    worst = max(arm.percent(base) for arm in claimed)
    words = {True: "yes", False: "no", None: "open"}
    return Judgement(
        verdict,
        f"{spikes.count(True)} of {len(claimed)} ratios from 4× to 8× spike, {spikes.count(None)} open; "
        f"at most {worst:+.1f} % of perplexity",
        f"Perplexity of a token of held-out text, against the uncompressed arm (`{base.arm}`, {mean(base.nats):.4f} "
        f"nats a token, {len(base.nats)} seeds): at 4× to 8×, the most is {worst:+.1f} %. A spike is more than 1 % and "
        "more than two standard deviations of a seed; more than 1 % within two of them leaves open whether there is "
        "one. (`docs/study.md` takes differences seed by seed, and so may be surer of one, or less sure.) "
        f"{_setting(results)}{_unnormed(results)}",
        assumption,
        {f"{arm.ratio:.3g}× percent": arm.percent(base) for arm in arms},
        (
            ("arm", "ratio", "seeds", "bits per byte", "nats a token", "perplexity", "standard deviations", "spike"),
            _row(base, "–", "–", "–"),
            *(
                _row(arm, f"{arm.percent(base):+.2f} %", f"{arm.deviations(base):+.1f}", words[arm.spikes(base)])
                for arm in arms
            ),
        ),
    )


def _verdict(claimed: list[Losses], spikes: list[bool | None]) -> tuple[Verdict, str]:
    """And the assumption under which the claim holds."""
    without = [f"{arm.ratio:.3g}×" for arm, spike in zip(claimed, spikes, strict=True) if spike is False]
    if True not in spikes:
        return ("to be measured" if None in spikes else "reproduced"), ""
    # a spike anywhere in the range is one; a ratio at which the seeds cannot tell is no exception to it
    return ("true under an assumption", f"the ratio is {' or '.join(without)}") if without else ("refuted", "")


def _to_be_measured(found: str) -> Judgement:
    return Judgement(
        "to be measured",
        "–",
        f"Loss against the ratio of caches, with as many parameters and at least {SEEDS} seeds of every arm, is what "
        "decides (`docs/study.md`); a spike is more than two standard deviations of a seed and more than 1 % of "
        f"perplexity. {found}",
    )


def _losses(results: Results, arm: str) -> Losses:
    text = results.text(arm)
    nats, bits = ([getattr(source, unit) for source in text] for unit in ("loss", "bpb"))
    return Losses(arm, results.ratio(arm), nats, bits)


def _row(arm: Losses, *compared: str) -> tuple[str, ...]:
    bits, nats = mean(arm.bits), mean(arm.nats)
    return f"`{arm.arm}`", f"{arm.ratio:.3g}×", str(len(arm.nats)), f"{bits:.4f}", f"{nats:.4f}", *compared


def _setting(results: Results) -> str:
    """What the numbers were made with."""
    names = [results.study.baseline, *results.compressed]
    runs = [run for run in results.runs if run.arm in names]
    tokens = sorted({run.tokens for run in runs})
    made_with = sorted({f"{run.machine}, PyTorch {run.torch}" for run in runs})
    base = results.arms[results.study.baseline]
    tuning = results.study.tuning
    tuned = "" if tuning is None else f", `{tuning.key}` chosen for each arm by trials"
    off = max(abs(results.arms[name].off) / results.arms[name].total for name in names)
    return (
        f"Ratios are of the caches that are allocated for {base.cache.context:,} tokens; every arm has "
        f"{base.total - base.looked_up:,} parameters (tables not counted) to within {100 * off:.2f} %, trained on "
        f"{' or '.join(f'{number:,}' for number in tokens)} tokens{tuned} ({'; '.join(made_with)}; the command is in "
        "`docs/study.md`). Small models on little text: this says how the scheme behaves there."
    )


def _unnormed(results: Results) -> str:
    """What the arms also differ in: a sentence, where the study has measured it."""
    if not set(UNNORMED) <= set(results.arms):
        return ""
    without, normed = (_losses(results, arm) for arm in UNNORMED)
    if min(len(without.nats), len(normed.nats)) < SEEDS:
        return ""
    return (
        f" The latents have no QK-norm and `{results.study.baseline}` has; without it, GQA's own perplexity changes by "
        f"{without.percent(normed):+.1f} % ({without.deviations(normed):+.1f} standard deviations)."
    )


def _needed(owner: Any, values: Any) -> Any:
    """`values` without the keys that no field of `owner`, or of what it holds, reads."""
    if dataclasses.is_dataclass(owner) and isinstance(values, Mapping):
        hints = typing.get_type_hints(owner)
        return {key: _needed(hints[key], value) for key, value in values.items() if key in hints}
    inner = typing.get_args(owner)
    if isinstance(owner, types.UnionType):  # of a type and None
        return _needed(inner[0], values)
    if inner and isinstance(values, Mapping):
        return {key: _needed(inner[-1], value) for key, value in values.items()}
    if inner and isinstance(values, list):
        return [_needed(inner[0], value) for value in values]
    return values
