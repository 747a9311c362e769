"""Arms made equal: the width of what every token passes is solved for, so that an arm has the anchor's parameters.

A shared expert is in the total and in the active parameters alike, so that one width matches both (DeepSeekMoE's shared
experts, arXiv 2401.06066; FFN widened to equalise, as in arXiv 2505.21487, section 4). Rows of tables, of which a token
takes one, are multiplied by nothing: they are in neither, and said apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from conf.compose import compose, overrides
from conf.schema import Refused
from launch.study.config import Study
from models import cost
from models.cost import Parameters
from train import config as run_config

STEP = 8
"""Widths apart at which an arm is built, to see what one more costs."""


@dataclass(frozen=True)
class Matched:
    """settings: of the arm, the solved width among them. unit: parameters of one more of that width.

    off: parameters, total and active alike, by which the arm is larger than the anchor.
    """

    settings: dict[str, Any]
    width: int
    parameters: Parameters
    unit: int
    off: int


def match(study: Study, common: tuple[str, ...]) -> dict[str, Matched]:
    """Every arm, by name. common: overrides of every run. Raises Refused where one cannot have the anchor's sizes."""
    wanted = _parameters(study, study.anchor, study.arms[study.anchor], common)
    return {name: _solve(study, name, settings, common, wanted) for name, settings in study.arms.items()}


def arguments(study: Study, settings: Mapping[str, Any], common: tuple[str, ...]) -> list[str]:
    """Of `python -m train`, for an arm, without its seed and directory."""
    return [f"experiment={study.experiment}", *common, *overrides(settings)]


def _solve(study: Study, name: str, settings: dict[str, Any], common: tuple[str, ...], wanted: Parameters) -> Matched:
    one, other = (_parameters(study, name, {**settings, study.knob: n}, common) for n in (1, 1 + STEP))
    unit = (other.active - one.active) // STEP
    if unit < 1 or multiplied(other) - multiplied(one) != unit * STEP:
        raise Refused(
            f"study.knob ({study.knob}) does not change the total and the active parameters of {name} alike; "
            "name the width of something that every token passes."
        )
    width = 1 + round((wanted.active - one.active) / unit)
    if width < 1:
        raise Refused(
            f"study.arms.{name} has {one.active - wanted.active:,} active parameters more than the anchor "
            f"{study.anchor} even with {study.knob}=1; give the anchor more room, or the arm less."
        )
    more = unit * (width - 1)
    parameters = Parameters(one.total + more, one.active + more, one.looked_up)
    off = parameters.active - wanted.active
    if multiplied(parameters) - multiplied(wanted) != off:
        raise Refused(
            f"study.arms.{name} cannot have both the total and the active parameters of {study.anchor}, because "
            "another share of it is idle; leave its routed experts as they are."
        )
    return Matched({**settings, study.knob: width}, width, parameters, unit, off)


def multiplied(parameters: Parameters) -> int:
    """All but rows that are looked up."""
    return parameters.total - parameters.looked_up


def _parameters(study: Study, name: str, settings: Mapping[str, Any], common: tuple[str, ...]) -> Parameters:
    try:
        config = run_config.read(compose(arguments(study, settings, common)))
        return cost.parameters(cost.meta(config.model))
    except Refused as refusal:
        raise Refused(f"study.arms.{name}: {refusal}") from None
