"""Which part of a tensor that is spread over ranks this one holds."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor

from models.box import Box, whole


def local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing memory with the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def box_of(tensor: Tensor) -> Box:
    """However the mesh cuts it; a tensor that is not sharded is one part."""
    if not isinstance(tensor, DTensor):
        return whole(tensor.detach())
    (chunk,) = tensor.__create_chunk_list__()  # what torch.distributed.checkpoint asks of a tensor
    return Box(tuple(chunk.offsets), local(tensor).detach())
