"""A copy of the state in host memory, taken while training waits: the memory is kept from save to save."""

from __future__ import annotations

from collections.abc import Mapping

import numpy
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .files import as_bytes


class Staging:
    """Host buffers for this rank's part of every tensor; page-locked where the tensors are on an accelerator."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def reserve(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the memory now. The first touch of fresh memory costs many times a copy into memory in use."""
        for name, tensor in tensors.items():
            part = _part(tensor)
            held = self._buffers.get(name)
            if held is None or held.shape != part.shape or held.dtype != part.dtype:
                buffer = torch.empty(part.shape, dtype=part.dtype, pin_memory=not part.is_cpu)
                self._buffers[name] = buffer.zero_()

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as they are now, on the host, sharded as they are; valid until the next call."""
        self.reserve(tensors)
        for name, tensor in tensors.items():
            _copy(_part(tensor), self._buffers[name])
        if not all(_part(tensor).is_cpu for tensor in tensors.values()):
            torch.accelerator.synchronize()
        return {name: _like(self._buffers[name], tensor) for name, tensor in tensors.items()}


def _copy(part: Tensor, buffer: Tensor) -> None:
    if part.is_cpu and part.is_contiguous():
        # One thread fills the memory bus. torch's copy takes all of them, and waits for the slowest core every tensor.
        numpy.copyto(as_bytes(buffer), as_bytes(part))
    else:
        buffer.copy_(part, non_blocking=True)


def _part(tensor: Tensor) -> Tensor:
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def _like(part: Tensor, tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return part
    # `DTensor.from_local` would move the part to the mesh's device; the planner only asks the layout.
    return DTensor(part, tensor._spec, requires_grad=False)
