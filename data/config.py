"""Which data a run reads. `source: x` means `Config` of `data/x.py`; nothing registers."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, cast

import data
from conf.schema import Refused, build
from data.source import Source, SourceConfig


@dataclass(frozen=True)
class DataConfig:
    """The configuration group `data`.

    train, validation: a source each, `{source: corpus, path: …}`; no validation where it is null.
    seed:              draws the order of the training data.
    """

    train: dict[str, Any]
    validation: dict[str, Any] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        source_config(self.train, "data.train")
        if self.validation is not None:
            source_config(self.validation, "data.validation")

    def open_train(self) -> Source:
        """Raises Refused where the source cannot be read whole."""
        return source_config(self.train, "data.train").open()

    def open_validation(self) -> Source | None:
        """Raises Refused where the source cannot be read whole."""
        return None if self.validation is None else source_config(self.validation, "data.validation").open()


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


def _modules() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(data.__path__)]


def _config_class(name: str) -> type | None:
    return getattr(import_module(f"data.{name}"), "Config", None)


def _sources() -> list[str]:
    return [name for name in _modules() if _config_class(name) is not None]
