"""Models as a user names them: of conf/model with choices, or a directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from conf import schema
from conf.schema import Refused
from models import catalog
from models.config import ModelConfig
from models.weights import open_config


@dataclass(frozen=True)
class Named:
    """name: as given, `backbone_tiny attention=mla`."""

    name: str
    config: ModelConfig


def named(words: list[str]) -> list[Named]:
    """Names, each followed by its choices. Raises Refused."""
    groups: list[list[str]] = []
    for word in words:
        if "=" not in word:
            groups.append([word])
        elif groups:
            groups[-1].append(word)
        else:
            raise Refused(f"{word} chooses for a model, so it comes after the model's name.")
    return [_one(name, choices) for name, *choices in groups]


def _one(name: str, choices: list[str]) -> Named:
    whole = " ".join([name, *choices])
    if name in catalog.names():
        values = catalog.section(name, dict(choice.split("=", 1) for choice in choices))
        return Named(whole, schema.build(ModelConfig, values, f"model {name}"))
    if not Path(name).is_dir():
        raise Refused(schema.unknown_choice("model", name, catalog.names()))
    if choices:
        raise Refused(f"{choices[0]} is not read: {name} is a directory, whose model leaves nothing open.")
    return Named(whole, open_config(name))
