"""Grouped-tied attention (arXiv 2505.21487, section 3.1): one state is the value, and half of the key, of a KV head.

The other half of every key is one rotated half-head that all heads share. The tied state itself is never rotated.
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
from models.rope import Rope, rotate_last


@dataclass(frozen=True)
class Config:
    """kv_heads: number of tied states. sink: see models.sink. output: null for one matrix, see models.output."""

    heads: int
    kv_heads: int
    head_dim: int
    sink: bool = False
    output: Grouped | None = None
    rope: Rope = field(default_factory=Rope)
    stands_alone: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if min(self.heads, self.kv_heads, self.head_dim) < 1:
            raise ValueError("heads, kv_heads and head_dim must be positive")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.head_dim % 4:
            raise ValueError(f"head_dim ({self.head_dim}) must be a multiple of 4: half of a key is rotated in pairs")
        if self.output is not None:
            self.output.check(self.heads)

    def build(self, width: int, *, writes: bool = True, reads: bool = True) -> GTA:
        return GTA(self, width, writes, reads)


class GTA(Attention):
    """Cached: the tied states, and the shared rotated half-head."""

    core: Core = staticmethod(blockwise.core)
    sink: Tensor | None

    def __init__(self, config: Config, width: int, writes: bool, reads: bool = True) -> None:
        super().__init__()
        c = self.config = config
        self.writes, self.reads, self.rope_dim, self.scale = writes, reads, c.head_dim // 2, c.head_dim**-0.5
        if reads:
            self.query = Linear(width, c.heads * c.head_dim, ("heads", "width"))
            self.output = output.build(c.output, c.heads * c.head_dim, width)
            sink.declare(self, c.heads, wanted=c.sink)
        if writes:
            self.tied = Linear(width, c.kv_heads * c.head_dim, ("kv_heads", "width"))
            self.key_rope = Linear(width, self.rope_dim, ("rope_dim", "width"))

    def slots(self) -> tuple[Slot, ...]:
        tied = Part("tied", (("kv_heads", self.config.kv_heads), ("head_dim", self.config.head_dim)))
        return (Slot("tied", (tied, Part("rope", (("rope_dim", self.rope_dim),)))),)

    def compress(self, x: Tensor, sequence: Sequence) -> tuple[Tensor, State]:
        c = self.config
        query = rotate_last(c.rope, self.query(x).unflatten(-1, (-1, c.head_dim)), self.rope_dim, sequence.position)
        return query, self.write(x, sequence) if self.writes else {}

    def write(self, x: Tensor, sequence: Sequence) -> State:
        parts = {
            "tied": self.tied(x).unflatten(-1, (-1, self.config.head_dim)),
            "rope": self.config.rope.rotate(self.key_rope(x), sequence.position),
        }
        return {"tied": at_tokens(sequence, parts)}

    def attend(self, query: Tensor, pieces: Pieces, sequence: Sequence) -> Result:
        readables = []
        for entries in pieces["tied"]:
            tied = entries.parts["tied"]
            shared = entries.parts["rope"].unsqueeze(2).expand(-1, -1, tied.shape[2], -1)
            key = torch.cat((tied[..., : self.rope_dim], shared), -1)
            readables.append((key, tied, Visibility.of(entries, sequence)))
        return Result(self.output(read(self.core, query, readables, self.scale, self.sink).flatten(-2)))

    def flops(self, queries: int, context: int, pairs: PairCount = visible_pairs) -> Flops:
        left = self.tied.flops() + self.key_rope.flops() if self.writes else 0.0
        if not self.reads:
            return Flops(queries * left)
        projections = self.query.flops() + self.output.flops() + left
        per_pair = 4.0 * self.config.heads * self.config.head_dim
        return Flops(queries * projections, pairs(self.slots()[0], queries, context) * per_pair)
