"""Clipping by the global norm, where some gradients are sharded and some are not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from parallel.box import local

from .shards import cuts

# Keeps a norm of zero from dividing; the constant of torch.nn.utils.clip_grad_norm_.
EPSILON = 1e-6


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients in place so that their joint 2-norm is at most `max_norm`; return the norm before.

    Each element counts once: sums go over the mesh axes that a gradient is sharded on and no other, and a plain tensor
    is taken to be the same on every rank. Collective over those axes; the device is never waited for. `max_norm` may be
    infinite, to measure alone. A gradient that is not finite makes the norm so: look at it before the step.

    Returns a scalar on the gradients' device, the same on each rank.
    Raises ValueError for a gradient still waiting for its sum over ranks.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    alike: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        if isinstance(gradient, DTensor) and any(placement.is_partial() for placement in gradient.placements):
            raise ValueError(f"a gradient of shape {tuple(gradient.shape)} is not summed over its ranks yet")
        alike[tuple(axis for axis, _ in cuts(gradient))].append(local(gradient))
    squares = []
    for axes, parts in alike.items():
        square = torch.stack(torch._foreach_norm(parts)).square().sum()
        for axis in axes:
            dist.all_reduce(square, group=axis)
        squares.append(square)
    norm = torch.stack(squares).sum().sqrt()
    factor = (max_norm / (norm + EPSILON)).clamp(max=1.0)
    torch._foreach_mul_([local(gradient) for gradient in gradients], factor)
    return norm
