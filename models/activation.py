"""The functions that gate a feed-forward: SiLU, and GELU (arXiv 1606.08415) in its tanh form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

Kind = Literal["silu", "gelu_tanh"]


def of(kind: Kind) -> Callable[[Tensor], Tensor]:
    """The function of that name."""
    return F.silu if kind == "silu" else gelu_tanh


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU, the normal distribution approximated by a tanh."""
    return F.gelu(x, approximate="tanh")
