"""From a plan's words to a mechanism: `scheme: x` in the section `attention` means the file `models/attention/x.py`.

Nothing is registered. A mechanism file holds a dataclass `Config` whose fields are the plan's keys and whose `build`
makes the module; putting the file into the folder is all it takes.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from conf import schema


def available(folder: str) -> list[str]:
    """The schemes of `folder`, sorted.

    It is one of "attention", "feedforward", "injection", "residual", "mtp", "cores.approximate".
    """
    package = importlib.import_module(f"models.{folder}")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def config_of(folder: str, values: Mapping[str, Any], where: str) -> Any:
    """The `Config` that `values` describe; its key `scheme` names the file, the others are the Config's own.

    Raises schema.Refused for an unknown scheme, key, or combination.
    """
    if not isinstance(values, Mapping) or not isinstance(values.get("scheme"), str):
        raise schema.Refused(f"{where} needs a scheme, one of: {', '.join(available(folder))}.")
    scheme = values["scheme"]
    if scheme not in available(folder):
        raise schema.Refused(schema.unknown_choice(f"{where}.scheme", scheme, available(folder)))
    module = importlib.import_module(f"models.{folder}.{scheme}")
    return schema.build(module.Config, {k: v for k, v in values.items() if k != "scheme"}, where)
