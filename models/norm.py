"""Root-mean-square norm (arXiv 1910.07467), with and without a gain, and layer norm (arXiv 1607.06450); statistics in
fp32."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from models.parameter import Module


class RMSNorm(Module):
    """x / rms(x) · gain · scale over the last dim of size `size`. start: of the gain. scale: a fixed number."""

    gain: Tensor

    def __init__(self, size: int, eps: float, axis: str = "width", start: float = 1.0, *, scale: float = 1.0) -> None:
        super().__init__()
        self.eps, self.scale = eps, scale
        _declare_gain(self, size, axis, start)

    def forward(self, x: Tensor) -> Tensor:
        gain = self.gain if self.scale == 1.0 else self.gain * self.scale
        return F.rms_norm(x, (x.shape[-1],), gain.to(x.dtype), self.eps)


class Gain(Module):
    """x · gain over the last dim of size `size`, for what is normalised already. start: of the gain."""

    gain: Tensor

    def __init__(self, size: int, axis: str = "width", start: float = 1.0) -> None:
        super().__init__()
        _declare_gain(self, size, axis, start)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain.to(x.dtype)


def _declare_gain(module: Module, size: int, axis: str, start: float) -> None:
    module.declare("gain", (size,), (axis,), "gain", start=None if start == 1.0 else lambda gain: gain.fill_(start))


def unit_rms(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last dim, without a gain."""
    return F.rms_norm(x, (x.shape[-1],), None, eps)


class LayerNorm(Module):
    """(x − mean) / deviation · gain + bias over the last dim of size `size`."""

    gain: Tensor
    bias: Tensor

    def __init__(self, size: int, eps: float, axis: str = "width") -> None:
        super().__init__()
        self.eps = eps
        self.declare("gain", (size,), (axis,), "gain")
        self.declare("bias", (size,), (axis,), "bias")

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), self.gain.to(x.dtype), self.bias.to(x.dtype), self.eps)


Kind = Literal["rms", "layer"]


def build(kind: Kind, size: int, eps: float) -> RMSNorm | LayerNorm:
    """The norm before or after a sublayer."""
    return RMSNorm(size, eps) if kind == "rms" else LayerNorm(size, eps)
