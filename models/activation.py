"""What gates a feed-forward (arXiv 2002.05202): f(gate) ⊙ up, f SiLU, or GELU (arXiv 1606.08415) in its tanh form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

Kind = Literal["silu", "gelu_tanh"]
Gating = Callable[[Tensor, Tensor], Tensor]
"""(gate, up) to their product, the gate through a function."""


def gating(kind: Kind) -> Gating:
    """With the function of that name."""
    return swiglu if kind == "silu" else geglu


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) ⊙ up."""
    return F.silu(gate) * up


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) ⊙ up, the normal distribution within GELU approximated by a tanh."""
    return F.gelu(gate, approximate="tanh") * up
