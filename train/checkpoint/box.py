"""Which part of a tensor that is spread over ranks this one holds."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.distributed.tensor import DTensor


class Box(NamedTuple):
    """begin: where in the whole tensor `local` begins, by dim. local: this rank's part, in the tensor's own memory."""

    begin: tuple[int, ...]
    local: Tensor

    def slices(self) -> tuple[slice, ...]:
        """That cut the part out of the whole tensor."""
        return tuple(slice(b, b + length) for b, length in zip(self.begin, self.local.shape, strict=True))


def box_of(tensor: Tensor) -> Box:
    """However the mesh cuts it; a tensor that is not sharded is one part."""
    if not isinstance(tensor, DTensor):
        return Box((0,) * tensor.ndim, tensor.detach())
    (chunk,) = tensor.__create_chunk_list__()  # what torch.distributed.checkpoint asks of a tensor
    return Box(tuple(chunk.offsets), tensor.to_local().detach())
