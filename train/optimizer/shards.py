"""Sharded tensors as an optimizer meets them: this rank's part, and the mesh axes that the elements are spread over."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement


def local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing memory with the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


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
