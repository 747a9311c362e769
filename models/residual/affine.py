"""ZAYA1's residual (arXiv 2605.05365): the stream and a sublayer's output pass a bias and a scale before they add up.

The papers scale before they add the bias; the released code, which this follows, adds first. The stream is fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from models import contract
from models.linear import full_precision


@dataclass(frozen=True)
class Config:
    """Nothing to set."""

    def build(self, width: int) -> Residual:
        return Residual(width)

    def ends(self, width: int) -> Ends:
        return Ends(width)


class Residual(contract.Residual):
    """(y + b_y) · s_y + (x + b_x) · s_x, each vector as wide as the stream."""

    output_scale: Tensor
    output_bias: Tensor
    stream_scale: Tensor
    stream_bias: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        for name in ("output", "stream"):
            self.declare(f"{name}_scale", (width,), ("width",), "gain", fp32=True)
            self.declare(f"{name}_bias", (width,), ("width",), "bias", fp32=True)

    def read(self, residual: Tensor) -> tuple[Tensor, None]:
        return residual.to(self.compute_dtype), None

    def write(self, residual: Tensor, carry: None, y: Tensor) -> Tensor:
        added = (y.to(residual.dtype) + self.output_bias) * self.output_scale
        return added + (residual + self.stream_bias) * self.stream_scale


class Ends(contract.Ends):
    """The embedding passes a bias and a scale of its own."""

    scale: Tensor
    bias: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.declare("scale", (width,), ("width",), "gain", fp32=True)
        self.declare("bias", (width,), ("width",), "bias", fp32=True)

    def enter(self, embedded: Tensor) -> Tensor:
        return (embedded.to(full_precision(embedded.dtype)) + self.bias) * self.scale

    def leave(self, residual: Tensor) -> Tensor:
        return residual.to(self.compute_dtype)
