"""What teaches an indexer: the main attention's own probabilities (DeepSeek-V3.2, arXiv 2512.02556, equations 3, 4).

The teacher of a query is its probability mass on each entry, summed over heads and then normalised on the candidates Ω:
all visible entries while the indexer warms up, the chosen ones afterwards. Its loss is KL(teacher ‖ softmax_Ω(scores)).
Where a window and a sink share the main softmax they stay in its denominator, so that a head which looks elsewhere
weighs less; only the mass is renormalised. The teacher carries no gradient.

The gradient of a tile's scores, softmax_Ω − teacher, is known as soon as the tile is, so its part of every gradient is
made in the forward and the tile is dropped, as in `models.loss`: linear memory, and nothing is asked of other ranks in
the backward.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.contract import Report, Sequence, Visibility
from models.linear import full_precision
from models.selection.index import Index, heads_at, heads_of, present, summed, take, tiles
from models.selection.top import top

SAMPLED = 8
"""Queries of a row for which a sparse model's recall is measured: each costs a dense look at all entries."""


@dataclass(frozen=True)
class Attended:
    """What the main attention scores. query: [B, S, H, d]; key: [B, T, K, d], H a multiple of K.

    rest: [B, S, H], log-sum-exp of what else is in its denominator (a window, a sink), None for nothing.
    """

    query: Tensor
    key: Tensor
    scale: float
    rest: Tensor | None = None

    def rows(self, start: int, stop: int, seen: int) -> Attended:
        """Of queries start..stop and the first `seen` entries."""
        rest = None if self.rest is None else self.rest[:, start:stop]
        return replace(self, query=self.query[:, start:stop], key=self.key[:, :seen], rest=rest)

    def mass(self, mask: Tensor) -> Tensor:
        """Probability of each entry where `mask` [B, S, T] is True, summed over heads. Returns [B, S, T]; holds
        [B, H, S, T]."""
        return self.mass_of_kv_heads(mask).sum(1)

    def mass_of_kv_heads(self, mask: Tensor) -> Tensor:
        """The same, summed over the query heads of each KV head. Returns [B, K, S, T]."""
        length, num_kv_heads = self.query.shape[1], self.key.shape[2]
        q_BKNd = self.query.unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        logits = (q_BKNd @ self.key.permute(0, 2, 3, 1)).to(full_precision(self.query.dtype)) * self.scale
        logits = logits.unflatten(2, (-1, length)).flatten(1, 2).masked_fill(~mask[:, None], float("-inf"))
        lse = torch.logsumexp(logits, -1)
        if self.rest is not None:
            lse = torch.logaddexp(lse, self.rest.transpose(1, 2).to(lse.dtype))
        # -inf - -inf is NaN: a query that sees nothing is measured against 0 instead
        mass = torch.exp(logits - lse.clamp_min(torch.finfo(lse.dtype).min)[..., None])
        return mass.unflatten(1, (num_kv_heads, -1)).sum(2)


def divergence(student: Tensor, mass: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """KL(mass normalised on the candidates ‖ softmax of `student` on them), [B, S], and its gradient in `student`.

    All [B, S, T], with `mask` True on the candidates. A query without a candidate, or without mass on any, counts 0.
    """
    some = mask.any(-1, keepdim=True)
    safe = student.masked_fill(~mask, float("-inf")).masked_fill(~some, 0.0)
    # 0 · -inf is NaN
    log_student = torch.log_softmax(safe, -1).masked_fill(~mask, 0.0)
    held = mass.to(student.dtype).masked_fill(~mask, 0.0)
    total = held.sum(-1, keepdim=True)
    teacher = held / total.clamp_min(torch.finfo(held.dtype).tiny)
    kl = (torch.xlogy(teacher, teacher) - teacher * log_student).sum(-1)
    return kl, (torch.exp(log_student) * (total > 0) - teacher).masked_fill(~mask, 0.0)


def recall(mass: Tensor, places: Tensor) -> Tensor:
    """Share of `mass` [B, S, T], zero where nothing is visible, that lies at `places` [B, S, k]. Returns [B, S]."""
    held = (mass.gather(-1, places.clamp_min(0)) * present(places)).sum(-1)
    return held / mass.sum(-1).clamp_min(torch.finfo(mass.dtype).tiny)


@dataclass(frozen=True)
class Lesson:
    """kl: sum over the queries in hand, with a gradient in the index alone. report: {"kl", "recall"}, each [2]: a sum,
    and over how many queries."""

    kl: Tensor
    report: Report


def teach_all(
    index: Index, key: Tensor, attended: Attended, visibility: Visibility, k: int, sequence: Sequence
) -> Lesson:
    """Candidates are all visible entries (warm-up).

    key: [B, T, d], the index keys. k: how many will be chosen, of which the recall is told.
    """
    with torch.no_grad():
        gradient = _Gradient.zero(index, key)
        kl, recalled, queries = (index.weight.new_zeros(()) for _ in range(3))
        for start, stop, seen in tiles(visibility, key.shape[1], max(index.query.shape[2], attended.query.shape[2])):
            tile, keys = index.rows(start, stop), key[:, :seen]
            mask = visibility.queries(start, stop).entries(0, seen).mask()
            mass = sequence.total(attended.rows(start, stop, seen).mass(mask), "heads")
            by_head = heads_of(tile, keys)
            student = summed(tile.weight, by_head)
            loss, slope = divergence(student, mass, mask)
            kl, recalled = kl + loss.sum(), recalled + recall(mass, top(student, mask, k)).sum()
            queries = queries + mask.any(-1).sum()
            by_head_slope = gradient.add_queries(start, stop, tile, by_head, slope)
            rows = by_head_slope.flatten(1, 2)
            gradient.query[:, start:stop] = (rows @ keys).view_as(tile.query)
            gradient.key[:, :seen] += rows.transpose(1, 2) @ tile.query.flatten(1, 2)
    report = {"kl": torch.stack((kl, queries)), "recall": torch.stack((recalled, queries))}
    return Lesson(gradient.attach(kl, index, key), report)


def teach_chosen(
    index: Index,
    key: Tensor,
    mass: Tensor,
    places: Tensor,
    attended: Attended,
    visibility: Visibility,
    sequence: Sequence,
) -> Lesson:
    """Candidates are the chosen entries (sparse training). mass: [B, S, k] of them, as `cores.gathered` returned it.

    The recall is of a few queries of each row, spread evenly.
    """
    with torch.no_grad():
        gradient, mask = _Gradient.zero(index, key), present(places)
        held = sequence.total(mass, "heads")
        kl = index.weight.new_zeros(())
        for start, stop, _ in tiles(visibility, places.shape[2], max(index.query.shape[2:])):
            tile, where = index.rows(start, stop), places[:, start:stop]
            keys = take(key, where)
            by_head = heads_at(tile, keys)
            student = summed(tile.weight, by_head)
            loss, slope = divergence(student, held[:, start:stop], mask[:, start:stop])
            kl = kl + loss.sum()
            by_head_slope = gradient.add_queries(start, stop, tile, by_head, slope)
            gradient.query[:, start:stop] = by_head_slope @ keys
            back = by_head_slope.transpose(-1, -2) @ tile.query
            flat = where.clamp_min(0).flatten(1)[..., None].expand(-1, -1, key.shape[-1])
            gradient.key.scatter_add_(1, flat, back.flatten(1, 2).to(gradient.key.dtype))
        recalled, asked = _sampled_recall(places, attended, visibility, sequence)
        queries = mask.any(-1).sum().to(kl.dtype)
    report = {"kl": torch.stack((kl, queries)), "recall": torch.stack((recalled, asked))}
    return Lesson(gradient.attach(kl, index, key), report)


def _sampled_recall(
    places: Tensor, attended: Attended, visibility: Visibility, sequence: Sequence
) -> tuple[Tensor, Tensor]:
    """Summed over SAMPLED queries of each row, and how many of these see anything."""
    length = places.shape[1]
    num_sampled = min(SAMPLED, length)
    at = (torch.arange(num_sampled, device=places.device) + 1) * length // num_sampled - 1
    few = replace(
        visibility, query_position=visibility.query_position[:, at], query_document=visibility.query_document[:, at]
    )
    rest = None if attended.rest is None else attended.rest[:, at]
    mask = few.mask()
    mass = sequence.total(replace(attended, query=attended.query[:, at], rest=rest).mass(mask), "heads")
    return recall(mass, places[:, at]).sum(), mask.any(-1).sum().to(mass.dtype)


@dataclass
class _Gradient:
    """Of the loss in an index's three tensors."""

    query: Tensor
    weight: Tensor
    key: Tensor

    @classmethod
    def zero(cls, index: Index, key: Tensor) -> _Gradient:
        wide = full_precision(key.dtype)
        return cls(torch.zeros_like(index.query), torch.zeros_like(index.weight), torch.zeros_like(key, dtype=wide))

    def add_queries(self, start: int, stop: int, tile: Index, by_head: Tensor, slope: Tensor) -> Tensor:
        """by_head: [B, s, I, T], after the ReLU; slope: [B, s, T], of the summed scores. Returns it by head, before the
        ReLU."""
        self.weight[:, start:stop] = (by_head @ slope[..., None]).squeeze(-1)
        return (tile.weight[..., None] * slope.unsqueeze(2) * (by_head > 0)).to(tile.query.dtype)

    def attach(self, value: Tensor, index: Index, key: Tensor) -> Tensor:
        """`value`, with this gradient."""
        pairs = ((index.query, self.query), (index.weight, self.weight), (key, self.key.to(key.dtype)))
        linear = sum((tensor * gradient).sum().to(value.dtype) for tensor, gradient in pairs)
        assert isinstance(linear, Tensor)
        return value + (linear - linear.detach())
