"""DeepSeek-V4's multi-token prediction (report, arXiv 2606.19348; formula as in its released code).

The residual stream is taken as it is, before it is collapsed and normalised: each of its streams through one matrix,
and what another matrix makes of the token ahead is added to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from models import ahead
from models.contract import Ends
from models.linear import Linear


@dataclass(frozen=True, kw_only=True)
class Config(ahead.Config):
    """Nothing of its own."""

    def join(self, width: int, norm: Callable[[], nn.Module]) -> Join:
        return Join(width, norm)


class Join(ahead.Join):
    """W_e norm(embedding) + W_h norm(stream), the latter for each stream."""

    def __init__(self, width: int, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embedding_norm, self.hidden_norm = norm(), norm()
        self.embedding = Linear(width, width, ("width", "width"))
        self.hidden = Linear(width, width, ("width", "width"))

    def forward(self, made: ahead.Made, embedded: Tensor, ends: Ends) -> Tensor:
        entered = ends.enter(self.embedding(self.embedding_norm(embedded)))
        return entered + self.hidden(self.hidden_norm(made.residual.to(embedded.dtype)))

    def flops(self, streams: int) -> float:
        return self.embedding.flops() + streams * self.hidden.flops()
