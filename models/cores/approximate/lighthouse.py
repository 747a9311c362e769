"""Lighthouse attention (arXiv 2605.06554): a core for training that attends over a pyramid of pooled tokens.

Queries, keys and values are mean-pooled into `levels` levels, `factor` entries of one into one of the next. Of the
coarsest level all entries are kept; of every finer one the children of the `keep` parents whose norms are largest. The
kept entries of a head attend to each other, causally by the last token that they cover, and each one's output is added
to the tokens from that one on, as many as it covers.

Which entries are kept depends on the whole row, also on tokens yet to come: the selection leaks, though no value does.
Hence for training alone; evaluation and decode read with an ordinary core, and a last phase should train with one. The
paper scores an entry by the norms of its query and its key, without saying how the two are joined: here they are added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from models.contract import NOTHING, Visibility
from models.cores import blockwise
from models.selection import selected


@dataclass(frozen=True)
class Config:
    """levels: of the pyramid, tokens included. factor: entries that are pooled into one. keep: parents a level, whose
    children are kept. dense: layers that read all, -1 being the last; in the paper the first two and the last two."""

    levels: int = 3
    factor: int = 2
    keep: int = 512
    dense: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.levels < 2 or self.factor < 2 or self.keep < 1:
            raise ValueError(
                f"levels ({self.levels}) and factor ({self.factor}) must be at least 2, keep ({self.keep}) at least 1"
            )

    def core(
        self, q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float, *, lse: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """See models.cores. Rows of tokens read to their start; raises ValueError for anything else: a window, blocks,
        a cache, or a softmax that is merged with another."""
        if lse or not visibility.aligned or visibility.reach is not None:
            raise ValueError(
                "the core lighthouse reads whole rows of tokens in one softmax, without window, sink or compressed "
                "blocks; choose another core for this scheme"
            )
        length, heads = q.shape[1], q.shape[2]
        k, v = (part.repeat_interleave(heads // part.shape[2], 2) for part in (k, v))
        document = visibility.document
        pad = -length % self.factor ** (self.levels - 1)
        q, k, v = (_heads_first(part, pad) for part in (q, k, v))
        document = F.pad(document, (0, pad), value=NOTHING).repeat_interleave(heads, 0)
        kept = self._select(self._pyramid(q, k, v, document))
        read = Visibility(kept.last, kept.document, kept.last, kept.document)
        out, _ = blockwise.core(kept.q.unsqueeze(2), kept.k.unsqueeze(2), kept.v.unsqueeze(2), read, scale)
        largest = self.factor ** (self.levels - 1)
        spread = _spread(out.squeeze(2), kept, document, largest)
        return spread.unflatten(0, (-1, heads)).transpose(1, 2)[:, :length], None

    def _pyramid(self, q: Tensor, k: Tensor, v: Tensor, document: Tensor) -> list[Level]:
        """q, k, v: [B·H, T, ...], document: [B·H, T], from the tokens to the coarsest level."""
        with torch.no_grad():
            score = (q.norm(dim=-1) + k.norm(dim=-1)).masked_fill(document == NOTHING, float("-inf"))
        levels = [Level(q, k, v, document, score, 1)]
        for _ in range(self.levels - 1):
            levels.append(levels[-1].pooled(self.factor))
        return levels

    def _select(self, levels: list[Level]) -> Kept:
        """The coarsest level, and of each finer one the children of the `keep` best parents."""
        everything = torch.arange(levels[-1].document.shape[1], device=levels[-1].document.device)
        kept = [levels[-1].take(everything.expand_as(levels[-1].document))]
        for finer, parents in zip(levels[-2::-1], levels[:0:-1], strict=True):
            best = selected(torch.sort(parents.score, dim=-1, descending=True, stable=True).indices[:, : self.keep])
            children = best[..., None] * self.factor + torch.arange(self.factor, device=best.device)
            kept.append(finer.take(children.flatten(1)))
        return Kept(*(torch.cat(parts, 1) for parts in zip(*kept, strict=True)))


class Kept(NamedTuple):
    """Entries [B·H, T, ...] of several levels. last: index of the last token that each covers. size: of how many."""

    q: Tensor
    k: Tensor
    v: Tensor
    document: Tensor
    last: Tensor
    size: Tensor


@dataclass(frozen=True)
class Level:
    """All entries of a level, [B·H, T, ...], of `size` tokens each. document: NOTHING where one would cover two."""

    q: Tensor
    k: Tensor
    v: Tensor
    document: Tensor
    score: Tensor
    size: int

    def pooled(self, factor: int) -> Level:
        """Means of `factor` neighbours, the largest of their scores."""
        q, k, v = (part.unflatten(1, (-1, factor)).mean(2) for part in (self.q, self.k, self.v))
        inside = self.document.unflatten(1, (-1, factor))
        document = torch.where((inside == inside[..., :1]).all(-1), inside[..., 0], NOTHING)
        score = self.score.unflatten(1, (-1, factor)).amax(-1).masked_fill(document == NOTHING, float("-inf"))
        return Level(q, k, v, document, score, self.size * factor)

    def take(self, index: Tensor) -> Kept:
        """index: [B·H, T']."""
        q, k, v = (part.gather(1, index[..., None].expand(-1, -1, part.shape[-1])) for part in (self.q, self.k, self.v))
        last = index * self.size + self.size - 1
        return Kept(q, k, v, self.document.gather(1, index), last, torch.full_like(last, self.size))


def _spread(out: Tensor, kept: Kept, document: Tensor, largest: int) -> Tensor:
    """Each entry's output [B·H, T', d] added to as many tokens as it covers, from its last one on, within its
    document."""
    length = document.shape[1]
    offset = torch.arange(largest, device=out.device)
    target = kept.last[..., None] + offset
    reached = ((offset < kept.size[..., None]) & (target < length)).flatten(1)
    target = target.clamp_max(length - 1).flatten(1)
    reached = reached & (document.gather(1, target) == kept.document.repeat_interleave(largest, 1))
    value = out.repeat_interleave(largest, 1).masked_fill(~reached[..., None], 0)
    total = out.new_zeros(out.shape[0], length, out.shape[-1])
    return total.scatter_add(1, target[..., None].expand_as(value), value)


def _heads_first(x: Tensor, pad: int) -> Tensor:
    """[B, S, H, d] to [B·H, S + pad, d]."""
    return F.pad(x.transpose(1, 2).flatten(0, 1), (0, 0, 0, pad))
