"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1; V3, arXiv 2412.19437, section 2.1.1).

Cached per token: one latent, normalised, and one rotated key, shared by all heads. Two ways to read them, exactly
equal: expanded to plain heads (training), or absorbed, where the up-projections move to the query and the output and
the latent is both key and value (decode).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from conf.schema import at_least
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
from models.linear import Linear
from models.norm import RMSNorm
from models.output import Grouped
from models.rope import Rope


@dataclass(frozen=True)
class Config:
    """Sizes in numbers per head, latents in numbers per token.

    query_latent: rank of the query's own bottleneck, null for a full-rank query. scale_multiplier: factor on the
    softmax scale, with which DeepSeek's models correct for YaRN. latent_eps: of the two latent norms. rescale:
    the normalised latents are multiplied by √(width / their size), so that what is made of them starts as large as what
    is made of the residual, the rotated key for one (arXiv 2603.02188). sink: see models.sink. output: null for one
    matrix, see models.output.
    """

    heads: int
    latent: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    query_latent: int | None = None
    scale_multiplier: float = 1.0
    latent_eps: float = 1e-6
    rescale: bool = False
    bias: bool = False
    sink: bool = False
    output: Grouped | None = None
    rope: Rope = field(default_factory=lambda: Rope(pairing="interleaved"))
    stands_alone: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.rope_dim < 2 or self.rope_dim % 2:
            raise ValueError(f"rope_dim ({self.rope_dim}) must be even and at least 2 to be rotated")
        if min(self.heads, self.latent, self.nope_dim, self.value_dim) < 1:
            raise ValueError("heads, latent, nope_dim and value_dim must be positive")
        if self.query_latent is not None and self.query_latent < 1:
            raise ValueError(
                f"query_latent ({self.query_latent}) must be positive; leave it null for a full-rank query"
            )
        at_least(0, self, "scale_multiplier", "latent_eps")
        if self.output is not None:
            self.output.check(self.heads)

    def build(self, width: int, *, writes: bool = True, reads: bool = True) -> MLA:
        return MLA(self, width, writes, reads)


class Query(NamedTuple):
    """nope: [B, S, H, nope_dim]; rope: [B, S, H, rope_dim], rotated."""

    nope: Tensor
    rope: Tensor


class MLA(Attention):
    """The latent is what is cached; heads exist only while they are read."""

    core: Core = staticmethod(blockwise.core)
    sink: Tensor | None

    def __init__(self, config: Config, width: int, writes: bool, reads: bool = True) -> None:
        super().__init__()
        c = self.config = config
        self.writes, self.reads, self.width = writes, reads, width
        self.scale = (c.nope_dim + c.rope_dim) ** -0.5 * c.scale_multiplier
        if reads:
            self._build_reading()
        if writes:
            rows = (c.latent, c.rope_dim)
            self.latent = Linear(width, sum(rows), ("latent", "width"), bias=c.bias, split=rows)
            self.latent_norm = self.latent_norm_of(c.latent)

    def _build_reading(self) -> None:
        c, width = self.config, self.width
        per_head = c.nope_dim + c.rope_dim
        if c.query_latent is None:
            self.query = Linear(width, c.heads * per_head, ("heads", "width"))
        else:
            self.query_down = Linear(width, c.query_latent, ("latent", "width"), bias=c.bias)
            self.query_norm = self.latent_norm_of(c.query_latent)
            self.query = Linear(c.query_latent, c.heads * per_head, ("heads", "latent"))
        # per head: nope_dim rows that make its key, then value_dim rows that make its value
        self.expansion = Linear(c.latent, c.heads * (c.nope_dim + c.value_dim), ("heads", "latent"))
        self.output = output.build(c.output, c.heads * c.value_dim, width, bias=c.bias)
        sink.declare(self, c.heads, wanted=c.sink)

    def latent_norm_of(self, size: int) -> RMSNorm:
        """Of latents of this size. What is cached is rescaled already."""
        c = self.config
        return RMSNorm(size, c.latent_eps, "latent", scale=(self.width / size) ** 0.5 if c.rescale else 1.0)

    def slots(self) -> tuple[Slot, ...]:
        size = self.config.latent
        # DeepSeek's kernels: fp8 with an fp32 scale for every 128 numbers; what is rotated stays in bf16
        latent = Part("latent", (("latent", size),), packed=(("fp8", size), ("fp32", -(-size // 128))))
        rope = Part("rope", (("rope_dim", self.config.rope_dim),))
        return (Slot("latent", (latent, rope)),)

    def compress(self, x: Tensor, sequence: Sequence) -> tuple[Query, State]:
        return self.look_for(self.low(x), sequence), self.write(x, sequence) if self.writes else {}

    def low(self, x: Tensor) -> Tensor:
        """What queries are made from: the normalised query latent, or x where there is none."""
        return x if self.config.query_latent is None else self.query_norm(self.query_down(x))

    def look_for(self, low: Tensor, sequence: Sequence) -> Query:
        """The heads' queries."""
        c = self.config
        nope, rope = self.query(low).unflatten(-1, (-1, c.nope_dim + c.rope_dim)).split((c.nope_dim, c.rope_dim), -1)
        return Query(nope, c.rope.rotate(rope, sequence.position))

    def write(self, x: Tensor, sequence: Sequence) -> State:
        """One latent and one rotated key a token."""
        c = self.config
        latent, key_rope = self.latent(x).split((c.latent, c.rope_dim), -1)
        parts = {"latent": self.latent_norm(latent), "rope": c.rope.rotate(key_rope, sequence.position)}
        return {"latent": at_tokens(sequence, parts)}

    def attend(self, query: Query, pieces: Pieces, sequence: Sequence) -> Result:
        out = self._absorbed if self._absorbs(pieces["latent"][0], query.nope.shape[1]) else self._expanded
        return Result(self.output(out(query, pieces["latent"], sequence).flatten(-2)))

    def expand(self, entries: Entries) -> tuple[Tensor, Tensor]:
        """Latents to plain heads: keys [B, T, H, nope_dim + rope_dim], values [B, T, H, value_dim]."""
        c = self.config
        heads = self.expansion(entries.parts["latent"]).unflatten(-1, (-1, c.nope_dim + c.value_dim))
        nope, value = heads.split((c.nope_dim, c.value_dim), -1)
        rope = entries.parts["rope"].unsqueeze(2).expand(-1, -1, nope.shape[2], -1)
        return torch.cat((nope, rope), -1), value

    def latents(self, entries: Entries) -> Tensor:
        """[B, T, number of latents, latent]: one, that all heads read."""
        return entries.parts["latent"].unsqueeze(2)

    def _absorbs(self, entries: Entries, queries: int) -> bool:
        return not entries.aligned and queries <= self._break_even()

    def _break_even(self) -> float:
        """Queries up to which the absorbed form costs less than expanding; the number of entries cancels."""
        c = self.config
        saved = 2 * c.latent - c.nope_dim - c.value_dim
        return c.latent * (c.nope_dim + c.value_dim) / saved if saved > 0 else float("inf")

    def _expanded(self, query: Query, pieces: list[Entries], sequence: Sequence) -> Tensor:
        readables = [(*self.expand(entries), Visibility.of(entries, sequence)) for entries in pieces]
        return read(self.core, torch.cat(query, -1), readables, self.scale, self.sink)

    def _absorbed(self, query: Query, pieces: list[Entries], sequence: Sequence) -> Tensor:
        low = self.absorb(query)
        readables = []
        for entries in pieces:
            latents = self.latents(entries)
            rope = entries.parts["rope"].unsqueeze(2).expand(-1, -1, latents.shape[2], -1)
            readables.append((torch.cat((latents, rope), -1), latents, Visibility.of(entries, sequence)))
        return self.lift(read(self.core, low, readables, self.scale, self.sink))

    def absorb(self, query: Query) -> Tensor:
        """Queries that read latents as they are: [B, S, H, latent + rope_dim]."""
        return torch.cat(
            (torch.einsum("bshn,hnc->bshc", query.nope, self._by_head(query.nope.dtype)[0]), query.rope), -1
        )

    def lift(self, latents: Tensor) -> Tensor:
        """Sums of latents [B, S, H, latent] to the heads' values [B, S, H, value_dim]."""
        return torch.einsum("bshc,hvc->bshv", latents, self._by_head(latents.dtype)[1])

    def _by_head(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """[H, nope_dim, latent] that makes keys, [H, value_dim, latent] that makes values."""
        c = self.config
        weight = self.expansion.weight.to(dtype).unflatten(0, (-1, c.nope_dim + c.value_dim))
        return weight.split((c.nope_dim, c.value_dim), 1)

    def flops(self, queries: int, context: int, pairs: PairCount = visible_pairs) -> Flops:
        c = self.config
        if not self.reads:
            return Flops(queries * self.latent.flops())
        scored = pairs(self.slots()[0], queries, context)
        if queries < context and queries <= self._break_even():
            return self.absorbed_flops(queries, scored)
        per_pair = 2.0 * c.heads * (c.nope_dim + c.rope_dim + c.value_dim)
        return Flops(queries * self._projections() + context * self.expansion.flops(), scored * per_pair)

    def absorbed_flops(self, queries: int, scored: float) -> Flops:
        """Of reading `scored` pairs as latents."""
        c = self.config
        moved = 2.0 * c.heads * c.latent * (c.nope_dim + c.value_dim)
        return Flops(queries * (self._projections() + moved), scored * 2.0 * c.heads * (2 * c.latent + c.rope_dim))

    def _projections(self) -> float:
        """Per token, the expansion aside."""
        low = 0.0 if self.config.query_latent is None else self.query_down.flops()
        left = self.latent.flops() if self.writes else 0.0
        return self.query.flops() + self.output.flops() + low + left
