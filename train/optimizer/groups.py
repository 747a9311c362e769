"""Parameter groups from the parameters' declarations, and the check that they partition the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from models.parameter import Parametrization, named_specs

Group = dict[str, Any]


def make_groups(
    model: nn.Module, parametrization: Parametrization, learning_rate: float, weight_decay: float
) -> list[Group]:
    """All parameters of `model`, together where their rules agree; a frozen one too, since a later phase may train it.

    Each group holds torch's own keys (`params`, `lr`, `eps`, `weight_decay`), its `learning_rate_scale`, and `matrix`:
    whether an optimizer of matrices may take it.

    Raises ValueError naming a parameter that was never declared, or is called a matrix and has fewer than two dims.
    """
    groups: dict[tuple[Any, ...], Group] = {}
    for name, parameter, spec in named_specs(model):
        matrix = parametrization.is_matrix(spec)
        if matrix and parameter.ndim < 2:
            raise ValueError(f"parameter {name} has role {spec.role}, a matrix, but {parameter.ndim} dims")
        scale = parametrization.learning_rate_scale(spec)
        rules = {
            "lr": learning_rate * scale,
            "learning_rate_scale": scale,
            "eps": parametrization.adam_epsilon(spec),
            "weight_decay": weight_decay if parametrization.weight_decay(spec) else 0.0,
            "matrix": matrix,
        }
        groups.setdefault(tuple(rules.values()), {"params": [], **rules})["params"].append(parameter)
    check_partition(model.named_parameters(), groups.values())
    return list(groups.values())


def check_partition(named_parameters: Iterable[tuple[str, nn.Parameter]], groups: Iterable[Mapping[str, Any]]) -> None:
    """Raise ValueError naming a parameter that no group holds, that is held twice, or that is none of the model's."""
    held = Counter(id(parameter) for group in groups for parameter in group["params"])
    for name, parameter in named_parameters:
        count = held.pop(id(parameter), 0)
        if count != 1:
            problem = "in no group" if count == 0 else f"taken {count} times"
            raise ValueError(f"parameter {name} is {problem}; the optimizer's groups must hold each parameter once")
    if held:
        raise ValueError(f"the optimizer's groups hold {len(held)} parameters that the model does not have")


def keep_numbers(optimizer: Optimizer) -> None:
    """Let a loaded state bring tensors only: learning rate, decay and betas are the configuration's, also on resume."""

    def with_own_numbers(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        own = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        loaded = state_dict["param_groups"]
        groups = [{**mine, "params": theirs["params"]} for mine, theirs in zip(own, loaded, strict=True)]
        return {**state_dict, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(with_own_numbers)
