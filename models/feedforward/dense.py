"""Dense SwiGLU feed-forward (arXiv 2002.05202): W_down(silu(W_gate x) ⊙ W_up x)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from models.contract import FeedForward, Sequence
from models.linear import Linear
from models.stream import Report


@dataclass(frozen=True)
class Config:
    hidden: int

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise ValueError(f"hidden ({self.hidden}) must be positive")

    def build(self, width: int) -> Dense:
        return Dense(width, self.hidden)


class Dense(FeedForward):
    """Every token through the same three matrices."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = Linear(width, hidden, ("hidden", "width"))
        self.up = Linear(width, hidden, ("hidden", "width"))
        self.down = Linear(hidden, width, ("width", "hidden"), "output")

    def forward(self, x: Tensor, sequence: Sequence) -> tuple[Tensor, Tensor | None, Report]:
        """x: [B, S, D]. Returns y, no auxiliary loss, nothing to report."""
        return self.swiglu(x), None, {}

    def swiglu(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))

    def flops(self) -> float:
        """Per token."""
        return self.gate.flops() + self.up.flops() + self.down.flops()
