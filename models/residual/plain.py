"""The plain residual (arXiv 1512.03385): x + f(x)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from models import contract


@dataclass(frozen=True)
class Config:
    """Nothing to set."""

    def build(self, width: int) -> Residual:
        return Residual()

    def ends(self, width: int) -> Ends:
        return Ends()


class Residual(contract.Residual):
    """No parameters."""

    def read(self, residual: Tensor) -> tuple[Tensor, None]:
        return residual, None

    def write(self, residual: Tensor, carry: None, y: Tensor) -> Tensor:
        return residual + y


class Ends(contract.Ends):
    """The stream is the embedding's width throughout."""

    def enter(self, embedded: Tensor) -> Tensor:
        return embedded

    def leave(self, residual: Tensor) -> Tensor:
        return residual
