"""Tensor product attention (arXiv 2501.06425): queries, keys and values as sums of outer products; factors are cached.

Each is (1 / R) Σ_r a_r ⊗ b_r, a_r [H] over the heads and b_r [head_dim], both linear in the token (section 3.1). The
rotation acts on b alone, so what is cached is rotated already (section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from models import output, sink
from models.contract import (
    Attention,
    Entries,
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
from models.linear import Linear, full_precision
from models.output import Grouped
from models.parameter import Module
from models.rope import Rope


@dataclass(frozen=True)
class Config:
    """query_rank: null for a full query projection ("KV only"). key_rank, value_rank: outer products a token keeps.
    sink: see models.sink. output: null for one matrix, see models.output.
    """

    heads: int
    head_dim: int
    query_rank: int | None = 6
    key_rank: int = 2
    value_rank: int = 2
    sink: bool = False
    output: Grouped | None = None
    rope: Rope = field(default_factory=Rope)
    stands_alone: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if min(self.heads, self.head_dim, self.key_rank, self.value_rank) < 1:
            raise ValueError("heads, head_dim, key_rank and value_rank must be positive")
        if self.query_rank is not None and self.query_rank < 1:
            raise ValueError(f"query_rank ({self.query_rank}) must be positive; null is a full query projection")
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even to be rotated")
        if self.output is not None:
            self.output.check(self.heads)

    def build(self, width: int, *, writes: bool = True, reads: bool = True) -> TPA:
        return TPA(self, width, writes, reads)


class Factors(Module):
    """a [B, S, R, H] and b [B, S, R, head_dim] of each token."""

    def __init__(self, width: int, heads: int, head_dim: int, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.by_head = Linear(width, rank * heads, ("heads", "width"))
        self.by_dim = Linear(width, rank * head_dim, ("latent", "width"))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.by_head(x).unflatten(-1, (self.rank, -1)), self.by_dim(x).unflatten(-1, (self.rank, -1))

    def flops(self) -> float:
        """Per token."""
        return self.by_head.flops() + self.by_dim.flops()


class TPA(Attention):
    """Cached: the factors of key and value. Materialised to plain heads in training, read as factors in decode."""

    core: Core = staticmethod(blockwise.core)
    sink: Tensor | None

    def __init__(self, config: Config, width: int, writes: bool, reads: bool = True) -> None:
        super().__init__()
        c = self.config = config
        self.writes, self.reads, self.scale = writes, reads, c.head_dim**-0.5
        self.query: Linear | Factors
        if reads:
            if c.query_rank is None:
                self.query = Linear(width, c.heads * c.head_dim, ("heads", "width"))
            else:
                self.query = Factors(width, c.heads, c.head_dim, c.query_rank)
            self.output = output.build(c.output, c.heads * c.head_dim, width)
            sink.declare(self, c.heads, wanted=c.sink)
        if writes:
            self.key = Factors(width, c.heads, c.head_dim, c.key_rank)
            self.value = Factors(width, c.heads, c.head_dim, c.value_rank)

    def slots(self) -> tuple[Slot, ...]:
        c = self.config
        parts = []
        for name, rank in (("key", c.key_rank), ("value", c.value_rank)):
            parts += [
                Part(f"{name}_head", (("latent", rank), ("heads", c.heads))),
                Part(f"{name}_dim", (("latent", rank), ("head_dim", c.head_dim))),
            ]
        return (Slot("factors", tuple(parts)),)

    def compress(self, x: Tensor, sequence: Sequence) -> tuple[Tensor, State]:
        rope = self.config.rope
        if isinstance(self.query, Factors):
            by_head, by_dim = self.query(x)
            query = _heads(by_head, rope.rotate(by_dim, sequence.position))
        else:
            query = rope.rotate(self.query(x).unflatten(-1, (-1, self.config.head_dim)), sequence.position)
        return query, self.write(x, sequence) if self.writes else {}

    def write(self, x: Tensor, sequence: Sequence) -> State:
        (key_head, key_dim), (value_head, value_dim) = self.key(x), self.value(x)
        parts = {"key_head": key_head, "key_dim": self.config.rope.rotate(key_dim, sequence.position)}
        parts |= {"value_head": value_head, "value_dim": value_dim}
        return {"factors": at_tokens(sequence, parts)}

    def attend(self, query: Tensor, pieces: Pieces, sequence: Sequence) -> Result:
        entries = pieces["factors"]
        few = not entries[0].aligned and self._factorises(query.shape[1])
        out = (self._factorised if few else self._materialised)(query, entries, sequence)
        return Result(self.output(out.flatten(-2)))

    def _factorises(self, queries: int) -> bool:
        """Whether reading the factors costs less than making heads of them; the number of entries cancels."""
        return queries * (self._factorised_flops() - self._scores_flops()) <= self._making_flops()

    def _factorised_flops(self) -> float:
        """Per pair of query and entry."""
        c = self.config
        return 2.0 * c.heads * ((c.head_dim + 1) * c.key_rank + c.head_dim * c.value_rank)

    def _scores_flops(self) -> float:
        """Per pair of query and materialised entry."""
        return 4.0 * self.config.heads * self.config.head_dim

    def _making_flops(self) -> float:
        """Per entry that is materialised."""
        c = self.config
        return 2.0 * (c.key_rank + c.value_rank) * c.heads * c.head_dim

    def _materialised(self, query: Tensor, pieces: list[Entries], sequence: Sequence) -> Tensor:
        readables = []
        for entries in pieces:
            key, value = (_heads(entries.parts[f"{n}_head"], entries.parts[f"{n}_dim"]) for n in ("key", "value"))
            readables.append((key, value, Visibility.of(entries, sequence)))
        return read(self.core, query, readables, self.scale, self.sink)

    def _factorised(self, query: Tensor, pieces: list[Entries], sequence: Sequence) -> Tensor:
        """Softmax over all pieces without a key or value of T × H × head_dim: for few queries."""
        scores = [self._scores(query, entries, sequence) for entries in pieces]
        sizes = [entries.position.shape[1] for entries in pieces]
        if self.sink is not None:
            scores.append(self.sink.to(scores[0].dtype)[:, None, None].expand_as(scores[0][..., :1]))
        # every query sees itself, or is padding that nobody reads
        weights = torch.softmax(torch.cat(scores, -1), -1).nan_to_num()[..., : sum(sizes)]
        out = torch.zeros_like(query)
        for entries, weight in zip(pieces, weights.split(sizes, -1), strict=True):
            by_head, by_dim = entries.parts["value_head"], entries.parts["value_dim"]
            mixed = torch.einsum("bhst,btrh->bshtr", weight.to(query.dtype), by_head)
            out = out + torch.einsum("bshtr,btrd->bshd", mixed, by_dim) / self.config.value_rank
        return out

    def _scores(self, query: Tensor, entries: Entries, sequence: Sequence) -> Tensor:
        """[B, H, S, T], -inf where not visible."""
        dots = torch.einsum("bshd,btrd->bhstr", query, entries.parts["key_dim"])
        scores = torch.einsum("bhstr,btrh->bhst", dots, entries.parts["key_head"])
        scores = scores.to(full_precision(query.dtype)) * (self.scale / self.config.key_rank)
        return scores.masked_fill(~Visibility.of(entries, sequence).mask()[:, None], float("-inf"))

    def flops(self, queries: int, context: int, pairs: PairCount = visible_pairs) -> Flops:
        c = self.config
        left = self.key.flops() + self.value.flops() if self.writes else 0.0
        if not self.reads:
            return Flops(queries * left)
        projections = self.query.flops() + self.output.flops() + left
        if c.query_rank is not None:
            projections += 2.0 * c.query_rank * c.heads * c.head_dim
        scored = pairs(self.slots()[0], queries, context)
        if queries < context and self._factorises(queries):
            return Flops(queries * projections, scored * self._factorised_flops())
        return Flops(queries * projections + context * self._making_flops(), scored * self._scores_flops())


def _heads(by_head: Tensor, by_dim: Tensor) -> Tensor:
    """(1 / R) Σ_r a_r ⊗ b_r: [B, S, R, H] and [B, S, R, d] to [B, S, H, d]."""
    return torch.einsum("bsrh,bsrd->bshd", by_head, by_dim) / by_head.shape[2]
