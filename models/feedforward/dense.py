"""Dense gated feed-forward (arXiv 2002.05202): W_down(f(W_gate x) ⊙ W_up x), f SiLU (SwiGLU) or GELU (GeGLU)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from models import activation
from models.contract import FeedForward, Result, Sequence
from models.linear import Linear


@dataclass(frozen=True)
class Config:
    hidden: int
    activation: activation.Kind = "silu"

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise ValueError(f"hidden ({self.hidden}) must be positive")

    def build(self, width: int) -> Dense:
        return Dense(width, self.hidden, self.activation)


class Dense(FeedForward):
    """Every token through the same three matrices."""

    def __init__(self, width: int, hidden: int, kind: activation.Kind = "silu") -> None:
        super().__init__()
        self.gated = activation.gating(kind)
        self.gate = Linear(width, hidden, ("hidden", "width"))
        self.up = Linear(width, hidden, ("hidden", "width"))
        self.down = Linear(hidden, width, ("width", "hidden"), "output")

    def forward(self, x: Tensor, sequence: Sequence, carried: Mapping[str, Any]) -> Result:
        return Result(self.glu(x))

    def glu(self, x: Tensor) -> Tensor:
        return self.down(self.gated(self.gate(x), self.up(x)))

    def flops(self) -> float:
        """Per token."""
        return self.gate.flops() + self.up.flops() + self.down.flops()
