"""Per-layer embeddings (Gemma 4 E2B and E4B; no paper): at every depth, what a table of that depth says of the token.

    c = norm(W_context e / √D)             e: the scaled embedding; the norm has one gain for all depths
    y = W_out (gelu(W_gate x) ⊙ (√P · table[id] + c) / √2)

x is the residual as it is. The published model packs the tables of all depths into one; here each depth owns its part,
so that sharding and pipeline stages hold and gather no other's. Only the shared gain is the model's preamble.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from conf.schema import at_least
from models import activation
from models.contract import FeedForward, Preamble, Result, Sequence
from models.linear import Linear

GAIN = "per-layer gain"


@dataclass(frozen=True)
class Config:
    """hidden: numbers that a depth has for each token."""

    hidden: int
    activation: activation.Kind = "gelu_tanh"
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise ValueError(f"hidden ({self.hidden}) must be positive")
        at_least(0, self, "norm_eps")

    def build(self, width: int, vocab: int) -> PerLayerEmbedding:
        return PerLayerEmbedding(self, width, vocab)

    def preamble(self) -> SharedGain:
        """What all depths have in common."""
        return SharedGain(self.hidden)


class SharedGain(Preamble):
    """Of the norm that every depth applies to its own projection of the embedding."""

    gain: Tensor
    provides = (GAIN,)

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.declare("gain", (hidden,), ("latent",), "gain")

    def forward(self, ids: Tensor, embedded: Tensor) -> dict[str, Any]:
        return {GAIN: self.gain}


class PerLayerEmbedding(FeedForward):
    """One depth's table, its projection of the embedding, and the gate by which the residual admits them."""

    table: Tensor
    normalises = True
    needs = ("ids", "embedding", GAIN)

    def __init__(self, config: Config, width: int, vocab: int) -> None:
        super().__init__()
        c = self.config = config
        self.gated = activation.gating(c.activation)
        self.declare("table", (vocab, c.hidden), ("vocab", "latent"), "embedding")
        self.context = Linear(width, c.hidden, ("latent", "width"))
        self.gate = Linear(width, c.hidden, ("latent", "width"))
        self.output = Linear(c.hidden, width, ("width", "latent"), "output")

    def forward(self, x: Tensor, sequence: Sequence, carried: Mapping[str, Any]) -> Result:
        embedded, gain = carried["embedding"], carried[GAIN]
        # rounded to the compute dtype, as the embedding's own scale is
        scale = torch.tensor(math.sqrt(self.config.hidden), dtype=x.dtype).item()
        token = F.embedding(carried["ids"], self.table).to(x.dtype) * scale
        context = self.context(embedded) * embedded.shape[-1] ** -0.5
        context = F.rms_norm(context, gain.shape, gain.to(x.dtype), self.config.norm_eps)
        return Result(self.output(self.gated(self.gate(x), (token + context) * 0.5**0.5)))

    def flops(self) -> float:
        """Per token; a lookup is none."""
        return self.context.flops() + self.gate.flops() + self.output.flops()
