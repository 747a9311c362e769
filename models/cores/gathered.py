"""Softmax attention over chosen entries only, gathered once for all query heads of a KV head (DeepSeek-V3.2, arXiv
2512.02556, 2.1; NSA, arXiv 2502.11089, 3.3.2).

The twin is the plain core under a mask of what was chosen. The gathered entries exist for one tile of queries at a time
and are gathered again in the backward.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.linear import full_precision
from models.selection.index import present

TILE_NUMBERS = 2**26
"""Gathered numbers held at once."""

TILE_QUERIES = 256
"""Queries of a tile, even where more would fit."""


class Choice(Protocol):
    """What each query of a KV head chose. size: how many entries at most."""

    @property
    def size(self) -> int: ...

    def rows(self, start: int, stop: int) -> Choice:
        """Of queries start..stop."""
        ...

    def places(self) -> Tensor:
        """[B, S, K, size] into T; K is 1 where all KV heads chose the same."""
        ...


class Chosen(NamedTuple):
    """The places themselves. chosen: [B, S, K, k]."""

    chosen: Tensor

    @property
    def size(self) -> int:
        return self.chosen.shape[3]

    def rows(self, start: int, stop: int) -> Chosen:
        return Chosen(self.chosen[:, start:stop])

    def places(self) -> Tensor:
        return self.chosen


def core(
    q: Tensor,
    key: tuple[Tensor, ...],
    choice: Choice,
    scale: float,
    rest: Tensor | None = None,
    *,
    value: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q: [B, S, H, d]; key: its parts [B, T, K, ...], d numbers together; value: [B, T, K, e], the key's first part
    unless given. Query head h reads KV head h // (H / K).

    rest: [B, S, H], log-sum-exp of whatever else is in the softmax's denominator (a window, a sink).
    Returns the output [B, S, H, e] and log-sum-exp [B, S, H] over the chosen alone, and their mass [B, S, K, size]: the
    probability that each chosen entry has in the whole softmax, summed over the heads of a KV head, without a gradient.
    """
    num_rows, length, heads, size = q.shape
    held = max(1, num_rows * choice.size * max(key[0].shape[2] * size, heads))
    step = min(TILE_QUERIES, max(1, TILE_NUMBERS // held))
    if length <= step:
        return _tile(q, key, value, choice, scale, rest)
    results = []
    for start in range(0, length, step):
        part = slice(start, start + step)
        cut = None if rest is None else rest[:, part]
        results.append(
            checkpoint(
                _tile,
                q[:, part],
                key,
                value,
                choice.rows(start, start + step),
                scale,
                cut,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        )
    out, lse, mass = zip(*results, strict=True)
    return torch.cat(out, 1), torch.cat(lse, 1), torch.cat(mass, 1)


def _tile(
    q: Tensor, key: tuple[Tensor, ...], value: Tensor | None, choice: Choice, scale: float, rest: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    num_kv_heads, places = key[0].shape[2], choice.places()
    places = places.expand(-1, -1, num_kv_heads, -1)
    taken, mask = [_take(part, places) for part in key], present(places)[:, :, :, None]
    keys = taken[0] if len(taken) == 1 else torch.cat(taken, -1)
    q_BSKGd = q.unflatten(2, (num_kv_heads, -1))
    scores = ((q_BSKGd * scale) @ keys.transpose(-1, -2)).to(full_precision(q.dtype))
    # of a query that chose nothing the softmax of -inf alone would be NaN, in the gradient too
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    chose_nothing = ~mask.any(-1)
    lse = torch.logsumexp(scores, -1).masked_fill(chose_nothing, float("-inf"))
    weights = torch.softmax(scores, -1).masked_fill(chose_nothing[..., None], 0.0)
    out = weights.to(q.dtype) @ (taken[0] if value is None else _take(value, places))
    mass = _mass(weights.detach(), lse.detach(), None if rest is None else rest.view_as(lse))
    return out.flatten(2, 3), lse.flatten(2, 3), mass


def _take(part: Tensor, places: Tensor) -> Tensor:
    """part: [B, T, K, d], places: [B, S, K, k], the first entry where there is none. Returns [B, S, K, k, d]."""
    index = places.clamp_min(0).transpose(2, 3).flatten(1, 2)[..., None].expand(-1, -1, -1, part.shape[-1])
    return part.gather(1, index).unflatten(1, (places.shape[1], -1)).transpose(2, 3)


def _mass(weights: Tensor, lse: Tensor, rest: Tensor | None) -> Tensor:
    """weights: [B, S, K, G, k], of the chosen alone; what else is in the denominator takes its share first."""
    if rest is None:
        return weights.sum(3)
    share = torch.sigmoid(lse - rest.detach().clamp_min(torch.finfo(lse.dtype).min))
    return (weights * share[..., None]).sum(3)
