"""What a study is: a backbone, named arms, what is made equal between them, and what is to be compared."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from conf.compose import ROOT, choices
from conf.schema import Refused, build, unknown_choice

NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class Interaction:
    """A 2×2: two changes, each alone and both together. Every field but `title` names an arm."""

    title: str
    neither: str
    first: str
    second: str
    both: str


@dataclass(frozen=True)
class Contrast:
    """One arm against another than the baseline. Both fields but `title` name an arm."""

    title: str
    arm: str
    against: str


@dataclass(frozen=True)
class Tuning:
    """A setting of which each arm is given its own best value: by trials, one a value, of a seed that no other run has.

    key: the setting. values: that are tried; the least loss of the last validation decides.
    """

    key: str
    values: list[float]

    def __post_init__(self) -> None:
        if len(set(self.values)) < 2:
            raise ValueError(f"values is {self.values}, but at least two are needed to choose from")


@dataclass(frozen=True)
class Study:
    """experiment: of conf/experiment, the backbone. arms: by name, the settings in which each differs from it, as
    `python -m train` takes them: a key, and a value that may be a whole plan of layers.

    anchor: the arm whose parameters the others get. knob: the setting that is solved for in the others, and that the
    anchor states: the width of something that every token passes. seeds: how many; they are 0, 1, ….
    baseline: the arm that the others are compared with. context: tokens at which caches are weighed.
    tuning: what is chosen for each arm by trials.
    curves: by name, arms that are one scheme at several ratios.
    shared: YAML anchors, which nothing reads.
    """

    experiment: str
    arms: dict[str, dict[str, Any]]
    knob: str
    anchor: str
    baseline: str
    seeds: int = 3
    context: int = 4096
    tuning: Tuning | None = None
    contrasts: list[Contrast] = field(default_factory=list)
    interactions: list[Interaction] = field(default_factory=list)
    curves: dict[str, list[str]] = field(default_factory=dict)
    shared: Any = None

    def __post_init__(self) -> None:
        if self.seeds < 1 or self.context < 1:
            raise ValueError(f"seeds ({self.seeds}) and context ({self.context}) must be at least 1")
        for name, settings in self.arms.items():
            if not NAME.fullmatch(name):
                raise ValueError(f"arms has one named '{name}', a folder's name; write letters, digits, _, . and -")
            own = self.own_settings - ({self.knob} if name == self.anchor else set())
            if taken := own.intersection(settings):
                raise ValueError(f"arms.{name} sets {min(taken)}, which the study sets itself; leave it out")
        for where, name in self._named():
            if name not in self.arms:
                raise ValueError(unknown_choice(where, name, list(self.arms)))
        if self.knob not in self.arms[self.anchor]:
            raise ValueError(f"arms.{self.anchor} is the anchor, so it has to set {self.knob}")

    @property
    def own_settings(self) -> set[str]:
        """Which the study gives a run itself."""
        return {"run.dir", "train.seed", self.knob, *([self.tuning.key] if self.tuning else [])}

    def _named(self) -> Iterable[tuple[str, str]]:
        yield "anchor", self.anchor
        yield "baseline", self.baseline
        for i, contrast in enumerate(self.contrasts):
            yield f"contrasts[{i}].arm", contrast.arm
            yield f"contrasts[{i}].against", contrast.against
        for i, square in enumerate(self.interactions):
            for corner in ("neither", "first", "second", "both"):
                yield f"interactions[{i}].{corner}", getattr(square, corner)
        for name, arms in self.curves.items():
            for i, arm in enumerate(arms):
                yield f"curves.{name}[{i}]", arm


def load(name: str) -> Study:
    """The study of conf/study/<name>.yaml, or of a file. Raises Refused."""
    file = Path(name) if name.endswith((".yaml", ".yml")) else ROOT / "study" / f"{name}.yaml"
    if not file.is_file():
        raise Refused(unknown_choice("study", name, choices("study")))
    try:
        values = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise Refused(f"{file} cannot be read ({type(error).__name__}); it must be YAML.") from None
    return replace(build(Study, values, "study"), shared=None)
