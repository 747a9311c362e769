"""Heavily compressed attention (DeepSeek-V4 report, arXiv 2606.19348): a window of tokens and every compressed block.

A query reads, in one softmax with a sink, the last `window` tokens uncompressed and one entry for each complete block
of `rate` tokens of its document; an entry is visible from its block's last token on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from models.compressor import Blocks, Compressor
from models.contract import Flops, PairCount, Pieces, Result, Sequence, Slot, State, visible_pairs
from models.cores.merge import read
from models.shared_kv import SharedConfig, SharedKV, packed


@dataclass(frozen=True, kw_only=True)
class Config(SharedConfig):
    """rate: tokens of a block."""

    rate: int
    stands_alone: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rate < 2:
            raise ValueError(f"rate ({self.rate}) must be at least 2: a block of one token has nothing to weigh")

    def build(self, width: int, *, writes: bool = True, reads: bool = True) -> HCA:
        return HCA(self, width, writes, reads)


class HCA(SharedKV):
    """Cached: a window of entries, one entry a block, and the rows of the block still open."""

    config: Config

    def __init__(self, config: Config, width: int, writes: bool, reads: bool = True) -> None:
        super().__init__(config, width, writes, reads)
        c, stored = config, packed(config.head_dim, config.rope_dim)
        self.blocks = Blocks("blocks", ("open_block",), c.head_dim, c.rate, c.rope, c.rope_dim, c.norm_eps, stored)
        if writes:
            self.compressor = Compressor(width, self.blocks)

    def slots(self) -> tuple[Slot, ...]:
        return (self.window_slot(), *self.blocks.slots())

    def compress(self, x: Tensor, sequence: Sequence) -> tuple[Tensor, State]:
        query = self.query_heads(self.query_latent(x), sequence)
        return query, self.write(x, sequence) if self.writes else {}

    def write(self, x: Tensor, sequence: Sequence) -> State:
        return {"window": self.window(x, sequence), "blocks": self.compressor(x, sequence)}

    def attend(self, query: Tensor, pieces: Pieces, sequence: Sequence) -> Result:
        readables = self.readables(pieces["window"], sequence, self.config.window)
        readables += self.readables(pieces["blocks"], sequence)
        return Result(self.leave(read(self.core, query, readables, self.scale, self.sink), sequence))

    def flops(self, queries: int, context: int, pairs: PairCount = visible_pairs) -> Flops:
        projections = self.projections() + (self.compressor.flops() if self.writes else 0.0)
        if not self.reads:
            return Flops(queries * projections)
        scored = sum(pairs(slot, queries, context) for slot in (self.window_slot(), self.blocks.slot()))
        return Flops(queries * projections, scored * self.flops_of_pair())
