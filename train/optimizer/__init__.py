"""Optimizers: `name: x` means `train/optimizer/x.py`, whose `Config` holds its numbers and builds it.

Every one of them takes its parameter groups from the parameters' declarations (groups.py), keeps all state from its
construction on, sharded like the parameters (so a checkpoint's shape never depends on whether a step was made), and
never waits for the device in a step.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, Protocol, cast

from torch import nn
from torch.optim import Optimizer

from conf.schema import Refused, build, unknown_choice
from models.parameter import Parametrization

from .clip import clip_gradients

__all__ = ["Config", "clip_gradients", "read", "set_learning_rate"]


class Config(Protocol):
    """What each optimizer's module calls `Config`: a dataclass of its numbers."""

    learning_rate: float

    def build(self, model: nn.Module, parametrization: Parametrization) -> Optimizer:
        """An optimizer over all parameters of `model`, which are real (not meta) and sharded already."""
        ...


def read(values: Mapping[str, Any], where: str = "optimizer") -> Config:
    """The configuration of the optimizer that `values["name"]` names. Raises Refused."""
    name = values.get("name")
    known = [
        module.name
        for module in pkgutil.iter_modules(__path__)
        if hasattr(importlib.import_module(f"{__name__}.{module.name}"), "Config")
    ]
    if name not in known:
        raise Refused(unknown_choice(f"{where}.name", name, known))
    module = importlib.import_module(f"{__name__}.{name}")
    numbers = {key: value for key, value in values.items() if key != "name"}
    return cast(Config, build(module.Config, numbers, where))


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """Give each group `learning_rate` times its own scale; called before each step with the schedule's rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["learning_rate_scale"]
