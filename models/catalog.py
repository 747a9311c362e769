"""The models that ship, conf/model/*.yaml, by name and without Hydra.

A backbone leaves sections open, `${attention}`, `${moe}` or `${residual}`: the file conf/<section>/<choice>.yaml fills
one in, with the choice that a run makes by default (conf/train.yaml) unless another is given. No other interpolation is
known.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from conf import schema
from conf.schema import Refused

CONF = Path(schema.__file__).parent

SECTIONS = ("attention", "moe", "residual")

_REFERENCE = re.compile(r"\$\{(\w+)\}")


def names(group: str = "model") -> list[str]:
    """The files of a group, sorted."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def description(name: str) -> str:
    """The comment that a model's file begins with."""
    comment = []
    for line in (CONF / "model" / f"{name}.yaml").read_text().splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    return " ".join(comment)


def open_sections(name: str) -> list[str]:
    """The sections that a model leaves open, sorted."""
    return sorted(set(_references(_read("model", name), name)))


def section(name: str, choices: Mapping[str, str]) -> dict[str, Any]:
    """The model's section of a configuration, its open sections filled in. choices: by group. Raises Refused."""
    values, wanted = _read("model", name), open_sections(name)
    for group, choice in choices.items():
        if group not in SECTIONS:
            raise Refused(
                f"{group}={choice} is not read: beside a model stand names of whole files alone, attention=mla for "
                "conf/attention/mla.yaml; to try other numbers, write them into a file there and name that."
            )
        if group not in wanted:
            raise Refused(
                f"{group}={choice} is not read: model {name} leaves {' and '.join(wanted) or 'nothing'} open."
            )
    chosen = {**_defaults(), **choices}
    return _filled(values, {group: _read(group, chosen[group]) for group in wanted})


def _defaults() -> dict[str, str]:
    listed = yaml.safe_load((CONF / "train.yaml").read_text())["defaults"]
    return {group: choice for entry in listed if isinstance(entry, dict) for group, choice in entry.items()}


def _read(group: str, choice: str) -> dict[str, Any]:
    if choice not in names(group):
        raise Refused(schema.unknown_choice(group, choice, names(group)))
    file = CONF / group / f"{choice}.yaml"
    try:
        values = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Refused(f"{file} cannot be read ({schema.fault(error)}); it must be YAML.") from None
    if not isinstance(values, dict):
        raise Refused(f"{file} holds no mapping of keys; write them as key: value.")
    return values


def _references(values: Any, name: str) -> Iterator[str]:
    if isinstance(values, dict | list):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _references(value, name)
    elif isinstance(values, str) and "${" in values:
        found = _REFERENCE.fullmatch(values)
        if found is None or found[1] not in SECTIONS:
            raise Refused(f"conf/model/{name}.yaml holds {values}; only whole sections can be left open: {SECTIONS}.")
        yield found[1]


def _filled(values: Any, sections: Mapping[str, Any]) -> Any:
    if isinstance(values, dict):
        return {key: _filled(value, sections) for key, value in values.items()}
    if isinstance(values, list):
        return [_filled(value, sections) for value in values]
    found = _REFERENCE.fullmatch(values) if isinstance(values, str) else None
    return sections[found[1]] if found else values
