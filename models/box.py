"""A part of a tensor, and where in the whole it lies."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Box(NamedTuple):
    """begin: where in the whole tensor `local` begins, by dim."""

    begin: tuple[int, ...]
    local: Tensor

    def slices(self) -> tuple[slice, ...]:
        """That cut the part out of the whole tensor."""
        return tuple(slice(b, b + length) for b, length in zip(self.begin, self.local.shape, strict=True))


def whole(tensor: Tensor) -> Box:
    """All of it."""
    return Box((0,) * tensor.ndim, tensor)
