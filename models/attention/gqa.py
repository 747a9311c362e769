"""Grouped-query attention (arXiv 2305.13245): K KV heads for H query heads; K = H is MHA, K = 1 is MQA (arXiv
1911.02150).

Options: an RMSNorm on each query and key head before the rotation (QK-norm, arXiv 2302.05442), and a sliding window
(arXiv 2004.05150).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from models.contract import (
    Attention,
    Flops,
    PairCount,
    Part,
    Pieces,
    Result,
    Sequence,
    Slot,
    State,
    Visibility,
    at_tokens,
    visible_pairs,
)
from models.cores import blockwise
from models.cores.merge import Core, read
from models.linear import Linear
from models.norm import RMSNorm
from models.rope import Rope


@dataclass(frozen=True)
class Config:
    """window: tokens a query reads, itself included; null reads all. bias: in all four projections. rope: null for no
    positions."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    qk_norm: bool = False
    bias: bool = False
    norm_eps: float = 1e-6
    rope: Rope | None = field(default_factory=Rope)

    def __post_init__(self) -> None:
        if min(self.heads, self.kv_heads, self.head_dim) < 1:
            raise ValueError("heads, kv_heads and head_dim must be positive")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.rope and self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even to be rotated")
        if self.window is not None and self.window < 1:
            raise ValueError(
                f"window ({self.window}) must be at least 1, the query itself; leave it null for no window"
            )

    def build(self, width: int, *, writes: bool = True) -> GQA:
        return GQA(self, width, writes)


class GQA(Attention):
    """K and V of each KV head are cached as they are read."""

    core: Core = staticmethod(blockwise.core)

    def __init__(self, config: Config, width: int, writes: bool) -> None:
        super().__init__()
        c = self.config = config
        self.writes, self.width, self.scale = writes, width, c.head_dim**-0.5
        self.query = Linear(width, c.heads * c.head_dim, ("heads", "width"), bias=c.bias)
        self.output = Linear(c.heads * c.head_dim, width, ("width", "heads"), "output", bias=c.bias)
        self.query_norm = RMSNorm(c.head_dim, c.norm_eps, "head_dim") if c.qk_norm else None
        if writes:
            self.key = Linear(width, c.kv_heads * c.head_dim, ("kv_heads", "width"), bias=c.bias)
            self.value = Linear(width, c.kv_heads * c.head_dim, ("kv_heads", "width"), bias=c.bias)
            self.key_norm = RMSNorm(c.head_dim, c.norm_eps, "head_dim") if c.qk_norm else None

    def slots(self) -> tuple[Slot, ...]:
        dims = (("kv_heads", self.config.kv_heads), ("head_dim", self.config.head_dim))
        return (Slot("kv", (Part("key", dims), Part("value", dims)), reach=self.config.window),)

    def compress(self, x: Tensor, sequence: Sequence) -> tuple[Tensor, State]:
        query = self._heads(self.query(x), self.query_norm, sequence)
        if not self.writes:
            return query, {}
        key = self._heads(self.key(x), self.key_norm, sequence)
        value = self.value(x).unflatten(-1, (-1, self.config.head_dim))
        return query, {"kv": at_tokens(sequence, {"key": key, "value": value})}

    def attend(self, query: Tensor, pieces: Pieces, sequence: Sequence) -> Result:
        readables = [
            (kv.parts["key"], kv.parts["value"], Visibility.of(kv, sequence, self.config.window)) for kv in pieces["kv"]
        ]
        return Result(self.output(read(self.core, query, readables, self.scale).flatten(-2)))

    def flops(self, queries: int, context: int, pairs: PairCount = visible_pairs) -> Flops:
        projections = self.query.flops() + self.output.flops()
        if self.writes:
            projections += self.key.flops() + self.value.flops()
        per_pair = 4.0 * self.config.heads * self.config.head_dim
        return Flops(queries * projections, pairs(self.slots()[0], queries, context) * per_pair)

    def _heads(self, x: Tensor, norm: RMSNorm | None, sequence: Sequence) -> Tensor:
        x = x.unflatten(-1, (-1, self.config.head_dim))
        x = x if norm is None else norm(x)
        return x if self.config.rope is None else self.config.rope.rotate(x, sequence.position)
