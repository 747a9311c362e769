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
    """clamp: see models.activation."""

    hidden: int
    activation: activation.Kind = "silu"
    clamp: float | None = None

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise ValueError(f"hidden ({self.hidden}) must be positive")
        if self.clamp is not None and self.clamp <= 0:
            raise ValueError(f"clamp ({self.clamp}) must be positive; leave it null for none")

    def build(self, width: int) -> Dense:
        return Dense(width, self.hidden, activation.gating(self.activation, self.clamp))


class Dense(FeedForward):
    """Every token through the same three matrices."""

    def __init__(self, width: int, hidden: int, gated: activation.Gating = activation.swiglu) -> None:
        super().__init__()
        self.gated = gated
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
