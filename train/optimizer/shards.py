"""Sharded tensors as an optimizer meets them: this rank's part of a gradient, and mesh axes that cut elements apart."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement

from parallel.box import local


def local_gradient(parameter: Tensor) -> Tensor:
    """This rank's part of the parameter's gradient, cut as the parameter is and of its dtype."""
    gradient = parameter.grad
    assert gradient is not None
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
        gradient = gradient.redistribute(parameter.device_mesh, parameter.placements)
    return local(gradient).to(parameter.dtype)


def cuts(tensor: Tensor) -> list[tuple[dist.ProcessGroup, Placement]]:
    """The mesh axes over which the tensor's elements are spread, each with how it cuts; none for a plain tensor."""
    if not isinstance(tensor, DTensor):
        return []
    mesh = tensor.device_mesh
    return [
        (mesh.get_group(axis), placement)
        for axis, placement in enumerate(tensor.placements)
        if not placement.is_replicate() and mesh.size(axis) > 1
    ]
