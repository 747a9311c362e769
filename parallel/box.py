"""Which part of a tensor that is spread over ranks this one holds."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor

from models.box import Box, whole


def part_of(tensor: Tensor) -> Tensor:
    """This rank's part, detached, in the tensor's own memory."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def box_of(tensor: Tensor) -> Box:
    """However the mesh cuts it; a tensor that is not sharded is one part."""
    if not isinstance(tensor, DTensor):
        return whole(part_of(tensor))
    (chunk,) = tensor.__create_chunk_list__()  # what torch.distributed.checkpoint asks of a tensor
    return Box(tuple(chunk.offsets), part_of(tensor))
