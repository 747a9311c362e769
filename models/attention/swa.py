"""A window alone (DeepSeek-V4 report, arXiv 2606.19348): its layers without a compressed branch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from models.contract import Flops, PairCount, Pieces, Result, Sequence, Slot, State, visible_pairs
from models.cores.merge import read
from models.shared_kv import SharedConfig, SharedKV


@dataclass(frozen=True, kw_only=True)
class Config(SharedConfig):
    """See SharedConfig."""

    stands_alone: ClassVar[bool] = True

    def build(self, width: int, *, writes: bool = True, reads: bool = True) -> SWA:
        return SWA(self, width, writes, reads)


class SWA(SharedKV):
    """Cached: a window of entries."""

    def slots(self) -> tuple[Slot, ...]:
        return (self.window_slot(),)

    def compress(self, x: Tensor, sequence: Sequence) -> tuple[Tensor, State]:
        query = self.query_heads(self.query_latent(x), sequence)
        return query, self.write(x, sequence) if self.writes else {}

    def write(self, x: Tensor, sequence: Sequence) -> State:
        return {"window": self.window(x, sequence)}

    def attend(self, query: Tensor, pieces: Pieces, sequence: Sequence) -> Result:
        readables = self.readables(pieces["window"], sequence, self.config.window)
        return Result(self.leave(read(self.core, query, readables, self.scale, self.sink), sequence))

    def flops(self, queries: int, context: int, pairs: PairCount = visible_pairs) -> Flops:
        scored = pairs(self.window_slot(), queries, context) if self.reads else 0.0
        return Flops(queries * self.projections(), scored * self.flops_of_pair())
