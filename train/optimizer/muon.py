"""Muon (Jordan et al., 2024) as in DeepSeek-V4 (arXiv 2606.19348): orthogonal updates of matrices, AdamW for the rest.

    M <- μ M + G;   W <- W (1 - η λ) - η · 0.18 · √max(rows, cols) · orthogonalise(μ M + G)

Each logically independent matrix is orthogonalised alone: every expert's, and every part of a declared split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from models.parameter import Parametrization, named_specs
from parallel.box import local

from .adamw import adam_state, adam_step, check_adam
from .groups import Group, keep_numbers, make_groups
from .newton_schulz import orthogonal_updates
from .shards import local_gradient
from .whole import on_whole_matrices


@dataclass(frozen=True)
class Config:
    """Muon's numbers, and AdamW's for what is not a matrix: the learning rate and the decay serve both.

    precision: of the orthogonalisation, and of what travels for it between ranks. Raises ValueError.
    """

    learning_rate: float
    weight_decay: float = 0.1
    momentum: float = 0.95
    precision: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    beta1: float = 0.9
    beta2: float = 0.95

    def __post_init__(self) -> None:
        check_adam(self.learning_rate, self.weight_decay, self.beta1, self.beta2)
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"momentum is {self.momentum}; give at least 0 and less than 1")

    def build(self, model: nn.Module, parametrization: Parametrization) -> Optimizer:
        """Muon over the matrices of `model`, AdamW over its other parameters, by their declared roles."""
        groups = make_groups(model, parametrization, self.learning_rate, self.weight_decay)
        splits = {parameter: spec.split for _, parameter, spec in named_specs(model)}
        return Muon(groups, splits, self.momentum, getattr(torch, self.precision), self.beta1, self.beta2)


class Muon(Optimizer):
    """Muon over the parameters of groups marked `matrix`, AdamW over the others; plain or sharded.

    splits: for each parameter, sizes of independent matrices along its rows. State of a matrix: momentum.
    """

    def __init__(
        self,
        groups: list[Group],
        splits: Mapping[nn.Parameter, tuple[int, ...]],
        momentum: float,
        precision: torch.dtype,
        beta1: float,
        beta2: float,
    ) -> None:
        super().__init__(groups, {"momentum": momentum, "betas": (beta1, beta2), "fused": True})
        self.splits = splits
        self.precision = precision
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = (
                    {"momentum": torch.zeros_like(parameter)} if group["matrix"] else adam_state(parameter)
                )
        keep_numbers(self)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. Collective over the axes of sharded matrices. No closure."""
        for group in self.param_groups:
            if group["matrix"]:
                self._matrix_step(group)
            else:
                adam_step(group, self.state)

    def _matrix_step(self, group: Group) -> None:
        matrices = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not matrices:
            return
        gradients = [local_gradient(matrix) for matrix in matrices]
        momenta = [local(self.state[matrix]["momentum"]) for matrix in matrices]
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, gradients)
        ahead = torch._foreach_add(gradients, momenta, alpha=group["momentum"])

        def orthogonal(places: Sequence[int], whole: Sequence[Tensor]) -> list[Tensor]:
            return orthogonal_updates(whole, [self.splits[matrices[place]] for place in places], self.precision)

        updates = on_whole_matrices([part.to(self.precision) for part in ahead], matrices, orthogonal)
        parts = [local(matrix) for matrix in matrices]
        torch._foreach_mul_(parts, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(
            parts, [update.to(part.dtype) for update, part in zip(updates, parts, strict=True)], alpha=-group["lr"]
        )
