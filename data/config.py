"""Which data a run reads. `source: x` means `Config` of `data/x.py`; nothing registers.

A section is one source, `{source: corpus, path: …}`, or several by name, `{code: {source: …}, books: {source: …}}`; a
name whose value is null is left out.
"""

from __future__ import annotations

import itertools
import pkgutil
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, NamedTuple, TypeVar, cast, get_type_hints

import data
from conf.schema import Refused, build
from data.mixture import Mixture, Weights, check_weights, exact_shares, refuse_other_tokenizers
from data.source import Facts, Source, SourceConfig

T = TypeVar("T")
Probes = dict[str, "Probe"]


class Probe(NamedTuple):
    """What a validation measures on. length: the sequence length there; None: that of the training at the time."""

    source: Source
    length: int | None

    def facts(self, sequence_length: int) -> Facts:
        """What the source says of itself at that length; of text, nothing."""
        return {**self.source.facts, "length": sequence_length} if self.source.facts else {}


@dataclass(frozen=True)
class DataConfig:
    """The configuration group `data`.

    train:      one source, or several, each with its `weight`: the share of windows that it is to have, up to a common
                factor.
    validation: one source or several; null for none. Each may say at which `length` it is read. Its `grid` of settings,
                `{length: [64, 128], depth: [0, 0.5, 1]}`, stands for a source for each combination, which is named
                NAME/length=64/depth=0 and so on.
    seed:       draws the order of the training data.
    """

    train: dict[str, Any]
    validation: dict[str, Any] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        exact_shares([weight for _, weight in self._train().values()], "data.train")
        self._validation()

    def open(self) -> tuple[Mixture, Probes]:
        """All of it. Raises Refused where a source cannot be read whole, or they do not go together."""
        mixture, probes = self.open_train(), self.open_validation()
        refuse_other_tokenizers(
            {f"data.train ({name})": source for name, source in mixture.sources.items()}
            | {f"data.validation ({name})": probe.source for name, probe in probes.items()}
        )
        return mixture, probes

    def open_train(self) -> Mixture:
        """Raises Refused where a source cannot be read whole."""
        parts = self._train()
        sources = {name: config.open() for name, (config, _) in parts.items()}
        return Mixture(sources, {name: weight for name, (_, weight) in parts.items()})

    def open_validation(self) -> Probes:
        """By name, in the order given. Raises Refused where a source cannot be read whole."""
        return {name: Probe(config.open(), length) for name, (config, length) in self._validation().items()}

    def check_weights(self, weights: Weights, where: str) -> None:
        """Raises Refused where a phase's weights, given at `where`, are not those of the sources in `train`."""
        names = list(self._train())
        if len(names) == 1:
            raise Refused(f"{where} gives weights, but data.train is one source; name several there, or leave it out.")
        check_weights(weights, names, where)

    def _train(self) -> dict[str, tuple[SourceConfig, float]]:
        parts = {}
        for entry in _entries(self.train, "data.train"):
            weight = 1.0 if entry.alone else entry.take(_Share).weight
            parts[entry.name] = (source_config(entry.settings, entry.where), weight)
        return parts

    def _validation(self) -> dict[str, tuple[SourceConfig, int | None]]:
        probes = {}
        for entry in _entries(self.validation, "data.validation"):
            for suffix, chosen in entry.take(_Grid).combinations():
                one = _Entry(entry.name + suffix, entry.where, {**entry.settings, **chosen}, entry.alone)
                length = one.take(_Length).length
                probes[one.name] = (source_config(one.settings, one.where), length)
        return probes


def headline(probes: Probes) -> str:
    """The source whose loss is `val_loss`: the first that holds text, or the first where none does."""
    return next(
        (name for name, probe in probes.items() if probe.source.bytes_per_token is not None), next(iter(probes))
    )


def source_config(values: Mapping[str, Any], where: str) -> SourceConfig:
    """The settings of the source that `values["source"]` names, read from the other keys. Raises Refused."""
    name = values.get("source")
    if name is None:
        raise Refused(f"{where}.source is missing; choose one of {', '.join(_sources())}.")
    owner = _config_class(name) if name in _modules() else None
    if owner is None:
        raise Refused(f"{where}.source is '{name}', which is no data source; choose one of {', '.join(_sources())}.")
    settings = {key: value for key, value in values.items() if key != "source"}
    return cast(SourceConfig, build(owner, settings, where))


@dataclass(frozen=True)
class _Share:
    weight: float


@dataclass(frozen=True)
class _Length:
    length: int | None = None

    def __post_init__(self) -> None:
        if self.length is not None and self.length < 1:
            raise ValueError(f"length ({self.length}) must be at least 1")


@dataclass(frozen=True)
class _Grid:
    grid: dict[str, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, values in self.grid.items():
            if not values or any(values.count(value) > 1 for value in values):
                raise ValueError(f"grid.{key} is {values}; give at least one value, and each once")

    def combinations(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """What each adds to a name, and the settings that it chooses."""
        for values in itertools.product(*self.grid.values()):
            chosen = dict(zip(self.grid, values, strict=True))
            yield "".join(f"/{key}={value}" for key, value in chosen.items()), chosen


@dataclass(frozen=True)
class _Entry:
    """One source of a section. where: its path in the configuration. alone: the section is this source."""

    name: str
    where: str
    settings: dict[str, Any]
    alone: bool

    def take(self, owner: type[T]) -> T:
        """Read the keys of the dataclass `owner` and take them out of the settings."""
        keys = [key for key in get_type_hints(owner) if key in self.settings]
        return build(owner, {key: self.settings.pop(key) for key in keys}, self.where)


def _entries(section: Mapping[str, Any] | None, where: str) -> Iterator[_Entry]:
    named = {name: values for name, values in (section or {}).items() if values is not None}
    if section is not None and not (named and all(isinstance(values, Mapping) for values in named.values())):
        yield _Entry(str(section.get("source")), where, dict(section), True)
        return
    for name, values in named.items():
        if not re.fullmatch(r"[\w-]+", name):
            raise Refused(f"{where} names a source '{name}'; write names of letters, digits, _ and -.")
        yield _Entry(name, f"{where}.{name}", dict(values), False)


def _modules() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(data.__path__)]


def _config_class(name: str) -> type | None:
    """What a module itself defines: a source's, not one that it imports."""
    module = import_module(f"data.{name}")
    owner = getattr(module, "Config", None)
    return owner if owner is not None and owner.__module__ == module.__name__ else None


def _sources() -> list[str]:
    return [name for name in _modules() if _config_class(name) is not None]
