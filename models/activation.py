"""What gates a feed-forward (arXiv 2002.05202): f(gate) ⊙ up, f SiLU or GELU (arXiv 1606.08415), the normal
distribution in it exact or approximated by a tanh.

Clamped as in DeepSeek-V4 (report, arXiv 2606.19348, section 2.1): the gate is kept below `clamp`, which bounds f from
above (from below it is bounded already), up within ± `clamp`. What is clamped is what enters, not the product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

Kind = Literal["silu", "gelu", "gelu_tanh"]
Function = Callable[[Tensor], Tensor]
Gating = Callable[[Tensor, Tensor], Tensor]
"""(gate, up) to their product, the gate through a function."""

FUNCTIONS: Mapping[Kind, Function] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}


def gating(kind: Kind, clamp: float | None = None) -> Gating:
    """With the function of that name."""
    gated = functools.partial(product, FUNCTIONS[kind])
    return gated if clamp is None else functools.partial(clamped, gated, clamp)


def product(function: Function, gate: Tensor, up: Tensor) -> Tensor:
    """f(gate) ⊙ up."""
    return function(gate) * up


swiglu = gating("silu")


def clamped(gated: Gating, clamp: float, gate: Tensor, up: Tensor) -> Tensor:
    """The product of what is left of both."""
    return gated(gate.clamp(max=clamp), up.clamp(-clamp, clamp))
