"""AdamW (Loshchilov and Hutter, arXiv 1711.05101): torch's fused step over each rank's own part of the parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from models.parameter import Parametrization
from parallel.box import local

from .groups import Group, keep_numbers, make_groups
from .shards import local_gradient


@dataclass(frozen=True)
class Config:
    """AdamW's numbers. ε and which parameters decay come from the parametrization. Raises ValueError."""

    learning_rate: float
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95

    def __post_init__(self) -> None:
        check_adam(self.learning_rate, self.weight_decay, self.beta1, self.beta2)

    def build(self, model: nn.Module, parametrization: Parametrization) -> Optimizer:
        """AdamW over all parameters of `model`, by their declared roles."""
        groups = make_groups(model, parametrization, self.learning_rate, self.weight_decay)
        return AdamW(groups, self.beta1, self.beta2)


def check_adam(learning_rate: float, weight_decay: float, beta1: float, beta2: float) -> None:
    """Raise ValueError for a number with which AdamW cannot step."""
    if learning_rate < 0.0 or weight_decay < 0.0:
        raise ValueError(f"learning_rate {learning_rate} and weight_decay {weight_decay} must not be negative")
    if not (0.0 <= beta1 < 1.0 and 0.0 <= beta2 < 1.0):
        raise ValueError(f"beta1 {beta1} and beta2 {beta2} must be at least 0 and less than 1")


class AdamW(Optimizer):
    """AdamW over the parameters of `groups`, plain or sharded. State per parameter: step, exp_avg, exp_avg_sq."""

    def __init__(self, groups: list[Group], beta1: float, beta2: float) -> None:
        # `fused` also tells torch, when a state is loaded, that step counts live on the parameters' device.
        super().__init__(groups, {"betas": (beta1, beta2), "fused": True})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = adam_state(parameter)
        keep_numbers(self)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. There is no closure."""
        for group in self.param_groups:
            adam_step(group, self.state)


def adam_state(parameter: Tensor) -> dict[str, Tensor]:
    """AdamW's state before the first step, sharded as the parameter is."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
    }


def adam_step(group: Group, state: dict[Tensor, dict[str, Tensor]]) -> None:
    """One AdamW update of a group's parameters that have a gradient."""
    parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
    beta1, beta2 = group["betas"]
    adamw(
        [local(parameter) for parameter in parameters],
        [local_gradient(parameter) for parameter in parameters],
        [local(state[parameter]["exp_avg"]) for parameter in parameters],
        [local(state[parameter]["exp_avg_sq"]) for parameter in parameters],
        [],
        [state[parameter]["step"] for parameter in parameters],
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
