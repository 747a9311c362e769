"""What gates a feed-forward (arXiv 2002.05202): f(gate) ⊙ up, f SiLU, or GELU (arXiv 1606.08415) in its tanh form.

Clamped as in DeepSeek-V4 (report, arXiv 2606.19348, section 2.1): the gate is kept below `clamp`, which bounds f from
above (from below it is bounded already), up within ± `clamp`. What is clamped is what enters, not the product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

Kind = Literal["silu", "gelu_tanh"]
Gating = Callable[[Tensor, Tensor], Tensor]
"""(gate, up) to their product, the gate through a function."""


def function(kind: Kind) -> Callable[[Tensor], Tensor]:
    """f of that name, by itself."""
    return F.silu if kind == "silu" else functools.partial(F.gelu, approximate="tanh")


def gating(kind: Kind, clamp: float | None = None) -> Gating:
    """With the function of that name."""
    gated = swiglu if kind == "silu" else geglu
    return gated if clamp is None else functools.partial(clamped, gated, clamp)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) ⊙ up."""
    return F.silu(gate) * up


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) ⊙ up, the normal distribution within GELU approximated by a tanh."""
    return F.gelu(gate, approximate="tanh") * up


def clamped(gated: Gating, clamp: float, gate: Tensor, up: Tensor) -> Tensor:
    """The product of what is left of both."""
    return gated(gate.clamp(max=clamp), up.clamp(-clamp, clamp))
