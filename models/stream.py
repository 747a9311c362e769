"""What flows through depth: the residual, what later layers read, and the losses gathered on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from models.linear import full_precision


@dataclass(frozen=True)
class Stream:
    """residual: [B, S, D], or what the residual scheme makes of it. carried: by name, what a later layer reads:
    tensors, and the pieces of a shared state. extra: one fp32 scalar, the sum of auxiliary losses, each coefficient ×
    local sum ÷ global count."""

    residual: Tensor
    carried: dict[str, Any]
    extra: Tensor

    @classmethod
    def start(cls, residual: Tensor, carried: dict[str, Any]) -> Stream:
        # Nothing, summed: 0, with a gradient where the residual has one, as it is behind a block that adds to it. So
        # the first block is compiled with the others, not by itself.
        return cls(residual, carried, residual[..., :0].sum(dtype=full_precision(residual.dtype)))


pytree.register_pytree_node(
    Stream,
    lambda s: ([s.residual, s.carried, s.extra], None),
    lambda leaves, _: Stream(*leaves),
    serialized_type_name="keyhole.Stream",
)
