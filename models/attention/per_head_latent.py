"""Per-head latent (after arXiv 2505.21487, section 3.2): K and V of each KV head through a bottleneck of its own.

What the press of 2026 calls "multi-head compression" has no paper; this is its plainest form: grouped latent attention
with one latent for each KV head. Heads are never expanded: the up-projections move to the query and the output
(DeepSeek-V2, arXiv 2405.04434, section 2.1.2), so that scores cost as little as the latent is wide. Positions live in
one rotated key that all heads share, or, without it, in the latent keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from models import output, sink
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
from models.output import Grouped
from models.parameter import Module
from models.rope import Rope


@dataclass(frozen=True)
class Config:
    """rank: numbers cached for each KV head's key, and for its value; head_dim / rank is the ratio of compression.

    rope_dim: size of the rotated key that all heads share, 0 to rotate the latent keys. sink: see models.sink.
    output: null for one matrix, see models.output.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rank: int
    rope_dim: int = 0
    sink: bool = False
    output: Grouped | None = None
    rope: Rope = field(default_factory=Rope)
    stands_alone: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if min(self.heads, self.kv_heads, self.head_dim) < 1:
            raise ValueError("heads, kv_heads and head_dim must be positive")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if not 1 <= self.rank <= self.head_dim:
            raise ValueError(f"rank ({self.rank}) must lie between 1 and head_dim ({self.head_dim})")
        rotated, name = (self.rope_dim, "rope_dim") if self.rope_dim else (self.rank, "rank, which is rotated,")
        if self.rope_dim < 0 or rotated % 2:
            raise ValueError(f"{name} ({rotated}) must be even and not negative")
        if self.output is not None:
            self.output.check(self.heads)

    def build(self, width: int, *, writes: bool = True, reads: bool = True) -> PerHeadLatent:
        return PerHeadLatent(self, width, writes, reads)


class Expansion(Module):
    """U: each KV head's latent [rank] to its head [head_dim]. Starts as the identity, so that no head starts smaller
    than an uncompressed one; the matrices around it are random, and any orthonormal U would do the same."""

    weight: Tensor

    def __init__(self, kv_heads: int, head_dim: int, rank: int) -> None:
        super().__init__()
        shape = (kv_heads, head_dim, rank)
        self.declare("weight", shape, ("kv_heads", "head_dim", "latent"), "projection", start=_identities)

    def to_latent(self, heads: Tensor) -> Tensor:
        """Uᵀ: [B, S, H, head_dim] to [B, S, H, rank]."""
        return self._by_head("bskgd,kdr->bskgr", heads)

    def from_latent(self, latent: Tensor) -> Tensor:
        """U: [B, S, H, rank] to [B, S, H, head_dim]."""
        return self._by_head("bskgr,kdr->bskgd", latent)

    def flops(self, heads: int) -> float:
        """Per token."""
        return 2.0 * heads * self.weight.shape[1] * self.weight.shape[2]

    def _by_head(self, product: str, x: Tensor) -> Tensor:
        grouped = x.unflatten(2, (self.weight.shape[0], -1))
        return torch.einsum(product, grouped, self.weight.to(x.dtype)).flatten(2, 3)


class PerHeadLatent(Attention):
    """Cached: a key latent and a value latent for each KV head, and the shared rotated key."""

    core: Core = staticmethod(blockwise.core)
    sink: Tensor | None

    def __init__(self, config: Config, width: int, writes: bool, reads: bool = True) -> None:
        super().__init__()
        c = self.config = config
        self.writes, self.reads, self.scale = writes, reads, (c.head_dim + c.rope_dim) ** -0.5
        if reads:
            self.query = Linear(width, c.heads * (c.head_dim + c.rope_dim), ("heads", "width"))
            self.key_expansion = Expansion(c.kv_heads, c.head_dim, c.rank)
            self.value_expansion = Expansion(c.kv_heads, c.head_dim, c.rank)
            self.output = output.build(c.output, c.heads * c.head_dim, width)
            sink.declare(self, c.heads, wanted=c.sink)
        if writes:
            self.key = Linear(width, c.kv_heads * c.rank, ("kv_heads", "width"))
            self.value = Linear(width, c.kv_heads * c.rank, ("kv_heads", "width"))
            if c.rope_dim:
                self.key_rope = Linear(width, c.rope_dim, ("rope_dim", "width"))

    def slots(self) -> tuple[Slot, ...]:
        c = self.config
        dims = (("kv_heads", c.kv_heads), ("latent", c.rank))
        parts = [Part("key", dims), Part("value", dims)]
        if c.rope_dim:
            parts.append(Part("rope", (("rope_dim", c.rope_dim),)))
        return (Slot("latents", tuple(parts)),)

    def compress(self, x: Tensor, sequence: Sequence) -> tuple[Tensor, State]:
        c = self.config
        nope, rope = self.query(x).unflatten(-1, (-1, c.head_dim + c.rope_dim)).split((c.head_dim, c.rope_dim), -1)
        query = self.key_expansion.to_latent(nope)
        if c.rope_dim:
            query = torch.cat((query, c.rope.rotate(rope, sequence.position)), -1)
        else:
            query = c.rope.rotate(query, sequence.position)
        return query, self.write(x, sequence) if self.writes else {}

    def write(self, x: Tensor, sequence: Sequence) -> State:
        c = self.config
        key, value = (linear(x).unflatten(-1, (-1, c.rank)) for linear in (self.key, self.value))
        parts = {"key": key, "value": value}
        if c.rope_dim:
            parts["rope"] = c.rope.rotate(self.key_rope(x), sequence.position)
        else:
            parts["key"] = c.rope.rotate(key, sequence.position)
        return {"latents": at_tokens(sequence, parts)}

    def attend(self, query: Tensor, pieces: Pieces, sequence: Sequence) -> Result:
        readables = []
        for entries in pieces["latents"]:
            key, value = entries.parts["key"], entries.parts["value"]
            if self.config.rope_dim:
                shared = entries.parts["rope"].unsqueeze(2).expand(-1, -1, key.shape[2], -1)
                key = torch.cat((key, shared), -1)
            readables.append((key, value, Visibility.of(entries, sequence)))
        out = read(self.core, query, readables, self.scale, self.sink)
        return Result(self.output(self.value_expansion.from_latent(out).flatten(-2)))

    def flops(self, queries: int, context: int, pairs: PairCount = visible_pairs) -> Flops:
        c = self.config
        left = 0.0
        if self.writes:
            left = self.key.flops() + self.value.flops() + (self.key_rope.flops() if c.rope_dim else 0.0)
        if not self.reads:
            return Flops(queries * left)
        projections = self.query.flops() + self.output.flops() + left
        projections += self.key_expansion.flops(c.heads) + self.value_expansion.flops(c.heads)
        per_pair = 2.0 * c.heads * (2 * c.rank + c.rope_dim)
        return Flops(queries * projections, pairs(self.slots()[0], queries, context) * per_pair)


def _identities(weight: Tensor) -> None:
    """[K, head_dim, rank]: the first `rank` columns of the identity, for each head."""
    weight.copy_(torch.eye(*weight.shape[1:]).expand_as(weight))
