"""From the command line to one resolved configuration: Hydra composes, every mistake becomes one sentence.

Group default < experiment < command line. Overrides follow Hydra's grammar; a value whose key does not exist reaches
the schema, which names the nearest key, instead of Hydra's own message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from conf.schema import Refused, fault, unknown_choice

ROOT = Path(__file__).parent

SECTIONS = ("attention", "moe", "residual")
"""Groups that a model refers to as a whole, `${attention}`; they are building material, not sections of a run."""


def groups(root: str = "train") -> list[str]:
    """The configuration groups that `conf/<root>.yaml` is made of, sorted."""
    found: set[str] = set()
    for entry in OmegaConf.load(ROOT / f"{root}.yaml").defaults:
        if isinstance(entry, str):
            found.update(groups(entry) if entry != "_self_" else ())
        else:
            found.update(map(str, entry))
    return sorted(found)


def choices(group: str) -> list[str]:
    """The files of a group, sorted."""
    return sorted(path.stem for path in (ROOT / group).glob("*.yaml"))


def compose(overrides: Sequence[str], root: str = "train") -> dict[str, Any]:
    """The configuration `conf/<root>.yaml` under `overrides`, resolved to plain values. Raises Refused."""
    parsed, known = _parse(overrides), groups(root)
    prepared = [_prepare(override, known) for override in parsed]
    try:
        with initialize_config_dir(str(ROOT), version_base="1.3"):
            config = hydra_compose(root, prepared)
        _refuse_unread(config, parsed)
        resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except (YAMLError, UnicodeDecodeError) as error:
        file = getattr(getattr(error, "problem_mark", error), "name", f"a file of {ROOT}")
        raise Refused(f"{file} cannot be read ({fault(error)}); it must be YAML.") from None
    # the others are of files whose YAML is no configuration
    except (HydraException, OmegaConfBaseException, ValueError, OSError, RecursionError) as error:
        raise Refused(f"the configuration cannot be composed: {fault(error)}.") from None
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items() if key not in SECTIONS}


def overrides(settings: Mapping[str, Any]) -> list[str]:
    """As they are typed after `python -m train`."""
    return [f"{key}={typed(value)}" for key, value in settings.items()]


def typed(value: Any) -> str:
    """A value in the grammar of overrides."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {typed(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(typed, value)) + "]"
    if isinstance(value, str):
        if re.fullmatch(r"[\w/.-]+|\$\{[\w.]+\}", value, re.ASCII):
            return value
        escaped = re.sub(r"(\\*)'", r"\1\1\\'", f"{value}'")  # a backslash counts for one but before a quote
        return f"'{escaped[:-2]}'"
    return json.dumps(value)


def _parse(overrides: Sequence[str]) -> list[Override]:
    parser = OverridesParser.create()
    parsed = []
    for override in overrides:
        try:
            parsed.append(parser.parse_override(override))
        except HydraException:  # its words are about its grammar
            raise Refused(
                f"an override cannot be read: {override!r}; write it as key=value, where a text with special signs "
                "stands in quotes: \"run.dir='a=b'\"."
            ) from None
    return parsed


def _prepare(override: Override, known: Sequence[str]) -> str:
    """Check the choice of a group; let the value of any other key through, to be checked with the whole."""
    line = override.input_line or ""
    key = override.key_or_group
    if override.is_sweep_override():
        raise Refused(f"{line} gives several values, but this is one run; start one for each value.")
    if re.split(r"[./]", key)[0] == "hydra":
        raise Refused(f"{line} is not read: Hydra only composes the configuration; run.dir names a run's directory.")
    if key not in known and (ROOT / key).is_dir():  # Hydra would take it for a group of this configuration
        raise Refused(f"{line} is not read: there is no group '{key}' here; there is: {', '.join(known)}.")
    if override.is_delete():
        return line
    if key in known:
        chosen = override.value()
        for choice in chosen if isinstance(chosen, list) and chosen else [chosen]:
            if choice not in choices(key):
                raise Refused(unknown_choice(key, choice, choices(key)))
        return line.lstrip("+")
    return line if line.startswith("++") else f"++{line.lstrip('+')}"


def _refuse_unread(config: DictConfig, overrides: list[Override]) -> None:
    """A section of building material that was asked for, but that the chosen model does not refer to."""
    model = repr(config.get("model"))
    for override in overrides:
        section = override.key_or_group.partition(".")[0]
        if section in SECTIONS and f"${{{section}}}" not in model:
            raise Refused(
                f"{override.input_line} is not read: the chosen model fixes its own {section}; "
                "choose a model that refers to it, such as model=backbone_tiny."
            )
