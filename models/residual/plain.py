"""The plain residual (arXiv 1512.03385): x + f(x)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """Nothing to set."""

    def build(self, width: int) -> Plain:
        return Plain()


class Plain(nn.Module):
    """How a sublayer reads the residual stream, and how its output is written back. No parameters."""

    @staticmethod
    def enter(embedded: Tensor) -> Tensor:
        """[B, S, D] to the residual stream."""
        return embedded

    @staticmethod
    def leave(residual: Tensor) -> Tensor:
        """The residual stream to [B, S, D]."""
        return residual

    def read(self, residual: Tensor) -> tuple[Tensor, None]:
        """Returns the sublayer's input [B, S, D] and whatever `write` will need."""
        return residual, None

    def write(self, residual: Tensor, carry: None, y: Tensor) -> Tensor:
        """y: [B, S, D], the sublayer's output."""
        return residual + y
