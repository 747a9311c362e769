"""DeepSeek-V3's multi-token prediction (arXiv 2412.19437, section 2.2), also of V3.2 and GLM-5.

One matrix takes in the token ahead and what the head read, both normalised. The paper puts the latter first; the
released weights, which this follows, the embedding. Which representation it is, the paper leaves open; the serving
engines take the one after the final norm, of a module after its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
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
    """W [norm(embedding); norm(hidden)]."""

    def __init__(self, width: int, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embedding_norm, self.hidden_norm = norm(), norm()
        self.projection = Linear(2 * width, width, ("width", "width"))

    def forward(self, made: ahead.Made, embedded: Tensor, ends: Ends) -> Tensor:
        both = torch.cat((self.embedding_norm(embedded), self.hidden_norm(made.hidden)), -1)
        return ends.enter(self.projection(both))

    def flops(self, streams: int) -> float:
        return self.projection.flops()
