"""A module with every kind of parameter that an optimizer or a checkpoint tells apart, trained on made-up gradients."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from models.parameter import Module
from train.optimizer import set_learning_rate


class Toy(Module):
    """Every kind of parameter that an optimizer tells apart; sizes that no rank count divides."""

    def __init__(self) -> None:
        super().__init__()
        self.declare("embedding", (11, 6), ("vocab", "width"), "embedding")
        self.declare("wide", (5, 9), ("heads", "width"), "projection")
        self.declare("wide_too", (5, 9), ("heads", "width"), "output")
        self.declare("tall", (9, 5), ("width", "heads"), "output")
        self.declare("short", (1, 6), ("one", "width"), "projection")
        self.declare("latent", (7, 6), ("latent", "width"), "projection", split=(5, 2))
        self.declare("up", (3, 8, 6), ("experts", "ffn", "width"), "expert", split=(4, 4))
        self.declare("down", (3, 6, 4), ("experts", "width", "ffn"), "expert_output")
        self.declare("gain", (6,), ("width",), "gain")
        self.declare("sink", (1,), ("heads",), "sink")

    def forward(self) -> Tensor:
        return torch.stack([parameter.sum() for parameter in self.parameters()]).sum()


def toy(dtype: torch.dtype = torch.float64) -> Toy:
    generator = torch.Generator().manual_seed(0)
    model = Toy().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model


def gradients(step: int) -> dict[str, Tensor]:
    """The same on every rank, whole."""
    generator = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in toy().named_parameters()}


def give(model: nn.Module, whole: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        gradient = whole[name].to(parameter.dtype)
        if isinstance(parameter, DTensor):
            gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
        parameter.grad = gradient


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        give(model, gradients(step))
        set_learning_rate(optimizer, 0.01 / (step + 1))
        optimizer.step()


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def everything(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Weights and optimizer state, whole, by name."""
    found = {name: whole(parameter).clone() for name, parameter in model.named_parameters()}
    state = cast(dict[str, dict[str, Any]], get_optimizer_state_dict(model, optimizer)["state"])
    for name, values in state.items():
        found |= {f"{name}.{key}": whole(value).clone() for key, value in values.items()}
    return found
