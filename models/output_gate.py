"""A gate on what a head has read, before the output projection: out ⊙ softplus(W x), x the sublayer's normalised input.

As in Laguna (poolside, arXiv 2605.27605; Transformers' `gating`), after gated attention (arXiv 2505.06708), whose gate
is a sigmoid. Softplus has no upper bound, so a head may be amplified; where W x is 0, as nearly in an untrained model,
it is ln 2.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from models.linear import Linear, full_precision

Kind = Literal["head", "element"]
"""One number for each head, or one for each number of a head."""


class OutputGate(Linear):
    """[B, S, D] to the gate [B, S, H, 1] or [B, S, H, d], in x's dtype; the softplus itself is computed in fp32."""

    def __init__(self, kind: Kind, width: int, heads: int, head_dim: int) -> None:
        per_head = 1 if kind == "head" else head_dim
        super().__init__(width, heads * per_head, ("heads", "width"))
        self.per_head = per_head

    def forward(self, x: Tensor) -> Tensor:
        raised = super().forward(x).to(full_precision(x.dtype))
        return F.softplus(raised).to(x.dtype).unflatten(-1, (-1, self.per_head))
