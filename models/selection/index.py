"""Index scores, and the choice made by them: I[t, s] = Σ_h w[t, h] · ReLU(q[t, h] · k[s]).

DeepSeek-V3.2, arXiv 2512.02556, equation 1. A query's score against an entry is one number, summed over many cheap
heads that share one key; only the sum matters, so the scores of single heads exist for one tile of queries at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from models.contract import Entries, Visibility
from models.linear import Linear, full_precision
from models.parameter import Module
from models.selection.top import NOWHERE, top

TILE_NUMBERS = 2**26
"""Scores of single heads held at once: 256 MiB in fp32."""

TILE_QUERIES = 256
"""Queries of a tile, even where more would fit."""


class Index(NamedTuple):
    """What a query looks for. query: [B, S, I, d] in I index heads; weight: [B, S, I] in fp32, signed, scaled."""

    query: Tensor
    weight: Tensor

    def rows(self, start: int, stop: int) -> Index:
        return Index(self.query[:, start:stop], self.weight[:, start:stop])


class IndexQuery(Module):
    """The query's side of an indexer. Nothing before it learns through it: both of its inputs are cut off."""

    def __init__(self, width: int, latent: int, heads: int, head_dim: int, latent_axis: str = "latent") -> None:
        """latent: width of what the queries are made from, with the logical axis `latent_axis`; weights are made from
        `width`."""
        super().__init__()
        self.head_dim, self.scale = head_dim, (heads * head_dim) ** -0.5
        self.query = Linear(latent, heads * head_dim, ("index_heads", latent_axis))
        self.weight = Linear(width, heads, ("index_heads", "width"), fp32=True)

    def forward(self, low: Tensor, x: Tensor) -> Index:
        """low: [B, S, latent], the normalised query latent; x: [B, S, D], the layer's input. The query is unrotated."""
        query = self.query(low.detach()).unflatten(-1, (-1, self.head_dim))
        return Index(query, self.weight(x.detach()) * self.scale)

    def flops(self) -> float:
        """Per token."""
        return self.query.flops() + self.weight.flops()


def scores(index: Index, key: Tensor) -> Tensor:
    """key: [B, T, d]. Returns [B, S, T] in fp32. Holds [B, S, I, T]: for a tile of queries, or a test."""
    return summed(index.weight, heads_of(index, key))


def heads_of(index: Index, key: Tensor) -> Tensor:
    """What each index head sees of all entries: ReLU(q · k) in fp32, [B, S, I, T]. key: [B, T, d]."""
    products = index.query.flatten(1, 2) @ key.transpose(1, 2)
    return torch.relu(products.to(full_precision(products.dtype))).unflatten(1, index.query.shape[1:3])


def heads_at(index: Index, keys: Tensor) -> Tensor:
    """What each index head sees of the entries taken for its query. keys: [B, S, k, d]. Returns [B, S, I, k]."""
    products = index.query @ keys.transpose(-1, -2)
    return torch.relu(products.to(full_precision(products.dtype)))


def summed(weight: Tensor, by_head: Tensor) -> Tensor:
    """Over heads: weight [B, S, I], by_head [B, S, I, T]. Returns [B, S, T]."""
    return (weight[..., None] * by_head).sum(2)


@torch.no_grad()
def choose(index: Index, key: Tensor, visibility: Visibility, k: int) -> Tensor:
    """Places of the k visible entries with the highest score, [B, S, min(k, T)]; see `top` for order and ties."""
    num_entries, chosen = key.shape[1], []
    k = min(k, num_entries)
    for start, stop, seen in tiles(visibility, num_entries, index.query.shape[2]):
        tile = scores(index.rows(start, stop), key[:, :seen])
        chosen.append(top(tile, visibility.queries(start, stop).entries(0, seen).mask(), k))
    return torch.cat(chosen, 1)


def tiles(visibility: Visibility, num_entries: int, numbers: int) -> Iterator[tuple[int, int, int]]:
    """Cut the queries so that a tile, of `numbers` for each pair, stays small. Yields (start, stop, entries to look
    at): where entries are the tokens in hand, those after the tile's last query are of no use to it."""
    num_rows, length = visibility.query_position.shape
    step = min(TILE_QUERIES, max(1, TILE_NUMBERS // max(1, num_rows * num_entries * numbers)))
    for start in range(0, length, step):
        stop = min(start + step, length)
        yield start, stop, stop if visibility.aligned else num_entries


def together(pieces: list[Entries]) -> Entries:
    """All pieces as one, since a choice is made among all entries. In order of position, which ties are broken by."""
    if len(pieces) == 1:
        return pieces[0]
    joined = pieces[0]
    for piece in pieces[1:]:
        joined = joined.concatenate(piece)
    order = torch.argsort(joined.position, dim=1, stable=True)

    def sort(values: Tensor) -> Tensor:
        return take(values, order[:, None]).squeeze(1)

    parts = {name: sort(part) for name, part in joined.parts.items()}
    return Entries(parts, sort(joined.position), sort(joined.document))


def take(rows: Tensor, places: Tensor) -> Tensor:
    """rows[b, places[b, s, j]]: rows [B, T, ...], places [B, S, k], the first row where NOWHERE. [B, S, k, ...]."""
    flat = places.clamp_min(0).flatten(1)
    flat = flat.view(*flat.shape, *[1] * (rows.dim() - 2)).expand(-1, -1, *rows.shape[2:])
    return rows.gather(1, flat).unflatten(1, places.shape[1:])


def present(places: Tensor) -> Tensor:
    """[B, S, k], True where an entry was chosen."""
    return places != NOWHERE
