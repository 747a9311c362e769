"""Root-mean-square norm (arXiv 1910.07467), with and without a gain; statistics in fp32."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from models.parameter import Module


class RMSNorm(Module):
    """x / rms(x) · gain over the last dim of size `size`."""

    gain: Tensor

    def __init__(self, size: int, eps: float, axis: str = "width") -> None:
        super().__init__()
        self.eps = eps
        self.declare("gain", (size,), (axis,), "gain")

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.gain.to(x.dtype), self.eps)


def unit_rms(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last dim, without a gain."""
    return F.rms_norm(x, (x.shape[-1],), None, eps)
