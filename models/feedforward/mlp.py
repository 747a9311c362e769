"""Feed-forward without a gate (arXiv 1706.03762, section 3.3): W_down f(W_up x + b_up) + b_down, in GPT-2 with GELU."""

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
    """bias: of both matrices."""

    hidden: int
    activation: activation.Kind = "gelu_tanh"
    bias: bool = True

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise ValueError(f"hidden ({self.hidden}) must be positive")

    def build(self, width: int) -> MLP:
        return MLP(self, width)


class MLP(FeedForward):
    """Every token through the same two matrices."""

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.function = activation.FUNCTIONS[config.activation]
        self.up = Linear(width, config.hidden, ("hidden", "width"), bias=config.bias)
        self.down = Linear(config.hidden, width, ("width", "hidden"), "output", bias=config.bias)

    def forward(self, x: Tensor, sequence: Sequence, carried: Mapping[str, Any]) -> Result:
        return Result(self.down(self.function(self.up(x))))

    def flops(self) -> float:
        """Per token."""
        return self.up.flops() + self.down.flops()
