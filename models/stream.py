"""What flows through depth: the residual, what later layers read, and the losses gathered on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from models.linear import full_precision

Report = dict[str, Tensor]
"""What a block measured, detached and of fixed shape; summed over micro-batches and ranks by whoever trains."""


@dataclass(frozen=True)
class Stream:
    """residual: [B, S, D], or what the residual scheme makes of it. carried: by writing layer, the pieces that a later
    layer reads. extra: one fp32 scalar, the sum of auxiliary losses, each coefficient × local sum ÷ global count."""

    residual: Tensor
    carried: dict[int, Any]
    extra: Tensor

    @classmethod
    def start(cls, residual: Tensor) -> Stream:
        return cls(residual, {}, torch.zeros((), dtype=full_precision(residual.dtype), device=residual.device))


pytree.register_pytree_node(
    Stream,
    lambda s: ([s.residual, s.carried, s.extra], None),
    lambda leaves, _: Stream(*leaves),
    serialized_type_name="keyhole.Stream",
)
