"""DeepSeek sparse attention (DeepSeek-V3.2, arXiv 2512.02556, section 2; GLM-5, arXiv 2602.15763): latent attention
that reads only the tokens a lightning indexer chooses.

Cached per token, beside what latent attention caches: one index key. A cheap score of all visible tokens chooses top_k
of them, and the absorbed form reads those. Dense at first; then the indexer alone learns to imitate the dense attention
(warm-up); then all is trained, sparse. Without a window or a first token: what is chosen is all that is read.
The indexer's Hadamard transform is left out: it is orthogonal, so that no score depends on it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from conf.schema import at_least
from models import fp8
from models.attention import mla
from models.contract import (
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
from models.cores import gathered
from models.cores.merge import merge
from models.linear import Linear, full_precision
from models.norm import LayerNorm
from models.rope import rotate_first
from models.selection import selected
from models.selection.index import Index, IndexQuery, choose, together
from models.selection.teacher import Attended, Lesson, teach_all, teach_chosen


@dataclass(frozen=True)
class Indexer:
    """heads of head_dim numbers share one key. top_k: tokens that a query reads.

    pairing: of its rotation, which turns the first rope_dim numbers: half in DeepSeek-V3.2, interleaved in GLM-5. They
    turn as the main attention's do. format: of the cached key; fp8 is rounded to while training too. kl_loss:
    coefficient of the loss that teaches it.
    """

    heads: int
    head_dim: int
    top_k: int
    pairing: Literal["half", "interleaved"] = "half"
    norm_eps: float = 1e-6
    format: Literal["bf16", "fp8"] = "bf16"
    kl_loss: float = 1.0

    def __post_init__(self) -> None:
        if min(self.heads, self.head_dim, self.top_k) < 1:
            raise ValueError("heads, head_dim and top_k must be positive")
        at_least(0, self, "norm_eps", "kl_loss")


@dataclass(frozen=True)
class Config(mla.Config):
    """Latent attention and its indexer, whose queries are made from the query latent."""

    indexer: Indexer = field(kw_only=True)
    stands_alone: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.query_latent is None:
            raise ValueError("query_latent must be given: the indexer's queries are made from it")
        if self.indexer.head_dim < self.rope_dim:
            raise ValueError(
                f"indexer.head_dim ({self.indexer.head_dim}) must be at least rope_dim ({self.rope_dim}), "
                "which is rotated of it"
            )

    def build(self, width: int, *, writes: bool = True) -> DSA:  # type: ignore[override]
        return DSA(self, width, writes)


class Query(NamedTuple):
    """main: of the latent attention. indexer: None where nothing is chosen."""

    main: mla.Query
    indexer: Index | None


class DSA(mla.MLA):
    """Latent attention with an indexer. The loss of the language model gives the indexer no gradient, and its own loss
    gives none to anything else."""

    config: Config

    def __init__(self, config: Config, width: int, writes: bool) -> None:
        super().__init__(config, width, writes)
        i = config.indexer
        assert config.query_latent is not None
        self.index_rope = replace(config.rope, pairing=i.pairing)
        self.index_query = IndexQuery(width, config.query_latent, i.heads, i.head_dim)
        if writes:
            self.index_key = Linear(width, i.head_dim, ("index", "width"))
            self.index_norm = LayerNorm(i.head_dim, i.norm_eps, "index")

    def selector(self) -> tuple[nn.Module, ...]:
        return (self.index_query, self.index_key, self.index_norm) if self.writes else (self.index_query,)

    def slots(self) -> tuple[Slot, ...]:
        (latent,) = super().slots()
        if self.mode == "dense":
            return (latent,)
        i = self.config.indexer
        packed = (("fp8", i.head_dim), ("fp32", 1)) if i.format == "bf16" else ()
        key = Part("key", (("index", i.head_dim),), i.format, packed)
        parts = (key,) if i.format == "bf16" else (key, Part("scale", (("one", 1),), "fp32"))
        if self.mode == "sparse":
            latent = replace(latent, chosen=i.top_k)
        return latent, Slot("index", parts)

    def compress(self, x: Tensor, sequence: Sequence) -> tuple[Query, State]:  # type: ignore[override]
        low = self.low(x)
        main = self.look_for(low, sequence)
        state = super().write(x, sequence) if self.writes else {}
        if self.mode == "dense":
            return Query(main, None), state
        index = self.index_query(low, x)
        index = index._replace(query=self._turned(index.query, sequence))
        if self.writes:
            key = self._turned(self.index_norm(self.index_key(x.detach())), sequence)
            parts = {"key": key}
            if self.config.indexer.format == "fp8":
                parts = dict(zip(("key", "scale"), fp8.rounded(key), strict=True))
            state |= {"index": at_tokens(sequence, parts)}
        return Query(main, index), state

    def attend(self, query: Query, pieces: Pieces, sequence: Sequence) -> Result:  # type: ignore[override]
        index = query.indexer
        if index is None:
            return super().attend(query.main, pieces, sequence)
        keys = together(pieces["index"])
        key = keys.parts["key"].to(query.main.nope.dtype)
        if "scale" in keys.parts:
            key = (key * keys.parts["scale"]).to(key.dtype)
        visibility = Visibility.of(keys, sequence)
        top_k = self.config.indexer.top_k
        if self.mode == "warmup" or key.shape[1] <= top_k:  # all that is visible is read
            result = super().attend(query.main, pieces, sequence)
            if not self._teaches():
                return result
            with torch.no_grad():
                keys_read = self.expand(together(pieces["latent"]))[0]
                attended = Attended(torch.cat(query.main, -1), keys_read, self.scale, self._rest(query.main))
            lesson = teach_all(index, key, attended, visibility, top_k, sequence)
            return self._taught(result.y, lesson, sequence)
        places = selected(choose(index, key, visibility, top_k))
        latents = together(pieces["latent"]).parts
        parts = latents["latent"].unsqueeze(2), latents["rope"].unsqueeze(2)
        low = self.absorb(query.main)
        rest = self._rest(query.main)
        out, lse, mass = gathered.core(low, parts, gathered.Chosen(places.unsqueeze(2)), self.scale, rest)
        if self.sink is not None:
            out = merge([(out, lse)], self.sink)
        y = self.output(self.lift(out).flatten(-2))
        if not self._teaches():
            return Result(y)
        with torch.no_grad():
            attended = Attended(low, torch.cat(parts, -1), self.scale, rest)
        lesson = teach_chosen(index, key, mass.squeeze(2), places, attended, visibility, sequence)
        return self._taught(y, lesson, sequence)

    def _turned(self, x: Tensor, sequence: Sequence) -> Tensor:
        return rotate_first(self.index_rope, x, self.config.rope_dim, sequence.position)

    def _rest(self, query: mla.Query) -> Tensor | None:
        """What is in the denominator beside the entries, [B, S, H]: the sink."""
        if self.sink is None:
            return None
        return self.sink.detach().to(full_precision(query.nope.dtype)).expand(query.nope.shape[:-1])

    def _teaches(self) -> bool:
        return torch.is_grad_enabled() and self.config.indexer.kl_loss > 0

    def _taught(self, y: Tensor, lesson: Lesson, sequence: Sequence) -> Result:
        queries = sequence.readers(1).clamp_min(1)
        return Result(y, self.config.indexer.kl_loss * lesson.kl / queries, lesson.report)

    def flops(self, queries: int, context: int, pairs: PairCount = visible_pairs) -> Flops:
        i = self.config.indexer
        if self.mode == "dense":
            return super().flops(queries, context, pairs)
        latent, index = self.slots()
        projections = self.index_query.flops() + (self.index_key.flops() if self.writes else 0.0)
        if self.mode == "warmup" or context <= i.top_k:
            return super().flops(queries, context, pairs) + Flops(queries * projections)
        selection = Flops(queries * projections, selection=pairs(index, queries, context) * 2.0 * i.heads * i.head_dim)
        return self.absorbed_flops(queries, pairs(latent, queries, context)) + selection
