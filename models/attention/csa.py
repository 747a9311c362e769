"""Compressed sparse attention (DeepSeek-V4 report, arXiv 2606.19348, section 2.3.1): a window of tokens, and of all
compressed blocks the few that a lightning indexer chooses.

Blocks overlap: an entry weighs the tokens of its own block and of the one before. The indexer compresses the same
blocks once more, to keys of its own. Trained as DeepSeek-V3.2's (arXiv 2512.02556, section 2.1.1): dense over all
blocks, then the indexer alone, taught by the main softmax with window and sink in its denominator, then on the chosen.

DeepSeek's code multiplies index queries and keys by a Hadamard matrix, which changes no product: it spreads outliers
before they are rounded to fp4, and is left to who rounds them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from conf.schema import at_least
from models.compressor import Blocks, Compressor
from models.contract import (
    Flops,
    PairCount,
    Pieces,
    Result,
    Sequence,
    Slot,
    State,
    Visibility,
    visible_pairs,
)
from models.cores import gathered
from models.cores.merge import Partial, log_mass, merge, parts, read
from models.rope import rotate_last
from models.selection import selected
from models.selection.index import Index, IndexQuery, choose, together
from models.selection.teacher import Attended, Lesson, teach_all, teach_chosen
from models.shared_kv import SharedConfig, SharedKV, packed


@dataclass(frozen=True)
class Indexer:
    """heads of head_dim numbers share one key for each block. top_k: blocks that a query reads.

    kl_loss: coefficient of the loss that teaches it; DeepSeek publishes none, and nothing else moves the indexer.
    """

    heads: int
    head_dim: int
    top_k: int
    kl_loss: float = 0.01

    def __post_init__(self) -> None:
        if min(self.heads, self.head_dim, self.top_k) < 1:
            raise ValueError("heads, head_dim and top_k must be positive")
        at_least(0, self, "kl_loss")


@dataclass(frozen=True, kw_only=True)
class Config(SharedConfig):
    """rate: tokens of a block."""

    rate: int
    indexer: Indexer

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rate < 2:
            raise ValueError(f"rate ({self.rate}) must be at least 2: a block of one token has nothing to weigh")
        if self.indexer.head_dim < self.rope_dim:
            raise ValueError(
                f"indexer.head_dim ({self.indexer.head_dim}) must be at least rope_dim ({self.rope_dim}), "
                "which is rotated of it"
            )

    def build(self, width: int, *, writes: bool = True) -> CSA:
        return CSA(self, width, writes)


class Query(NamedTuple):
    """heads: [B, S, H, head_dim]. indexer: what to choose blocks by, None where nothing is chosen."""

    heads: Tensor
    indexer: Index | None


class CSA(SharedKV):
    """Cached: a window of entries, an entry and an index key a block, and the rows that the next of both will need.

    The loss of the language model gives the indexer no gradient, and the indexer's gives none to anything else.
    """

    config: Config

    def __init__(self, config: Config, width: int, writes: bool) -> None:
        super().__init__(config, width, writes)
        c, i = config, config.indexer
        rotary = (c.rate, c.rope, c.rope_dim, c.norm_eps)
        stored = packed(c.head_dim, c.rope_dim)
        self.blocks = Blocks("blocks", ("last_block", "open_block"), c.head_dim, *rotary, stored)
        # fp4 with a one-byte scale for every 32 numbers
        stored = (("fp4", i.head_dim), ("fp8", -(-i.head_dim // 32)))
        self.index = Blocks("index", ("index_last_block", "index_open_block"), i.head_dim, *rotary, stored)
        self.index_query = IndexQuery(width, c.query_latent, i.heads, i.head_dim)
        if writes:
            self.compressor = Compressor(width, self.blocks)
            self.index_compressor = Compressor(width, self.index)

    def selector(self) -> tuple[nn.Module, ...]:
        return (self.index_query, self.index_compressor) if self.writes else (self.index_query,)

    def slots(self) -> tuple[Slot, ...]:
        window, blocks, tails = self.window_slot(), self.blocks.slot(), self.blocks.tail_slots()
        if self.mode == "dense":
            return (window, blocks, *tails)
        if self.mode == "sparse":
            blocks = replace(blocks, chosen=self.config.indexer.top_k)
        return (window, blocks, *tails, *self.index.slots())

    def compress(self, x: Tensor, sequence: Sequence) -> tuple[Query, State]:
        low = self.query_latent(x)
        heads, index = self.query_heads(low, sequence), None
        if self.mode != "dense":
            index = self.index_query(low, x)
            turned = rotate_last(self.config.rope, index.query, self.config.rope_dim, sequence.position)
            index = index._replace(query=turned)
        if not self.writes:
            return Query(heads, index), {}
        state = {"window": self.window(x, sequence), "blocks": self.compressor(x, sequence)}
        if index is not None:
            state["index"] = self.index_compressor(x.detach(), sequence)
        return Query(heads, index), state

    def attend(self, query: Query, pieces: Pieces, sequence: Sequence) -> Result:
        """Reports the loss and the recall of the indexer while it learns, see models.selection.teacher."""
        window = self.readables(pieces["window"], sequence, self.config.window)
        everything = window + self.readables(pieces["blocks"], sequence)
        if query.indexer is None:
            return self._result(read(self.core, query.heads, everything, self.scale, self.sink), None, sequence)
        index, keys = query.indexer, together(pieces["index"])
        key, visibility = keys.parts["kv"], Visibility.of(keys, sequence)
        blocks = together(pieces["blocks"]).parts["kv"]
        top_k, num_blocks = self.config.indexer.top_k, key.shape[1]
        if self.mode == "warmup" or num_blocks <= top_k:  # all that is visible is read
            out, lesson = read(self.core, query.heads, everything, self.scale, self.sink), None
            if self._teaches() and num_blocks:
                attended = self._attended(query, blocks, parts(self.core, query.heads, window, self.scale))
                lesson = teach_all(index, key, attended, visibility, top_k, sequence)
            return self._result(out, lesson, sequence)
        places = selected(choose(index, key, visibility, top_k))
        beside = parts(self.core, query.heads, window, self.scale)
        attended = self._attended(query, blocks, beside)
        choice = gathered.Chosen(places.unsqueeze(2))
        chosen, lse, mass = gathered.core(query.heads, (blocks.unsqueeze(2),), choice, self.scale, attended.rest)
        lesson = None
        if self._teaches():
            lesson = teach_chosen(index, key, mass.squeeze(2), places, attended, visibility, sequence)
        return self._result(merge([*beside, (chosen, lse)], self.sink), lesson, sequence)

    def flops(self, queries: int, context: int, pairs: PairCount = visible_pairs) -> Flops:
        i = self.config.indexer
        window, blocks = self.slots()[:2]
        projections = self.projections() + (self.compressor.flops() if self.writes else 0.0)
        scores = (pairs(window, queries, context) + pairs(blocks, queries, context)) * self.flops_of_pair()
        if self.mode == "dense":
            return Flops(queries * projections, scores)
        projections += self.index_query.flops() + (self.index_compressor.flops() if self.writes else 0.0)
        if self.mode == "warmup" or context // self.config.rate <= i.top_k:
            return Flops(queries * projections, scores)
        looked_at = pairs(self.index.slot(), queries, context)
        return Flops(queries * projections, scores, looked_at * 2.0 * i.heads * i.head_dim)

    @torch.no_grad()
    def _attended(self, query: Query, blocks: Tensor, beside: list[Partial]) -> Attended:
        """The main softmax as the indexer's teacher: window and sink keep their share of it."""
        return Attended(query.heads, blocks.unsqueeze(2), self.scale, log_mass(beside, self.sink))

    def _teaches(self) -> bool:
        return torch.is_grad_enabled() and self.config.indexer.kl_loss > 0

    def _result(self, out: Tensor, lesson: Lesson | None, sequence: Sequence) -> Result:
        y = self.leave(out, sequence)
        if lesson is None:
            return Result(y)
        queries = sequence.readers(self.config.rate).clamp_min(1)
        return Result(y, self.config.indexer.kl_loss * lesson.kl / queries, lesson.report)
