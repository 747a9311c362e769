"""Softmax attention over chosen entries only, gathered once for all heads (DeepSeek-V3.2, arXiv 2512.02556, 2.1).

The twin is the plain core under a mask of what was chosen. Heads share one key and one value, as absorbed latents and
compressed blocks do; the gathered entries exist for one tile of queries at a time and are gathered again in the
backward.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.linear import full_precision
from models.selection.index import present, take

TILE_NUMBERS = 2**26
"""Gathered numbers held at once."""

TILE_QUERIES = 256
"""Queries of a tile, even where more would fit."""


def core(
    q: Tensor, parts: tuple[Tensor, ...], places: Tensor, scale: float, rest: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """q: [B, S, H, d]; parts: the key's parts [B, T, ...], d numbers together, the first of which is the value [B, T,
    e]; places: [B, S, k] into T.

    rest: [B, S, H], log-sum-exp of whatever else is in the softmax's denominator (a window, a sink).
    Returns the output [B, S, H, e] and log-sum-exp [B, S, H] over the chosen alone, and their mass
    [B, S, k]: the probability that each chosen entry has in the whole softmax, summed over heads, without a gradient.
    """
    num_rows, length, heads, size = q.shape
    step = min(TILE_QUERIES, max(1, TILE_NUMBERS // max(1, num_rows * places.shape[2] * max(size, heads))))
    if length <= step:
        return _tile(q, parts, places, scale, rest)
    results = []
    for start in range(0, length, step):
        part = slice(start, start + step)
        cut = None if rest is None else rest[:, part]
        results.append(
            checkpoint(
                _tile,
                q[:, part],
                parts,
                places[:, part],
                scale,
                cut,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        )
    out, lse, mass = zip(*results, strict=True)
    return torch.cat(out, 1), torch.cat(lse, 1), torch.cat(mass, 1)


def _tile(
    q: Tensor, parts: tuple[Tensor, ...], places: Tensor, scale: float, rest: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    taken, mask = [take(part, places) for part in parts], present(places)[:, :, None]
    keys = taken[0] if len(taken) == 1 else torch.cat(taken, -1)
    scores = (q @ keys.transpose(-1, -2)).to(full_precision(q.dtype)) * scale
    seen = mask.any(-1)
    # a query that chose nothing would be softmax of -inf alone
    safe = scores.masked_fill(~mask, float("-inf")).masked_fill(~seen[..., None], 0.0)
    lse = torch.logsumexp(safe, -1).masked_fill(~seen, float("-inf"))
    weights = torch.softmax(safe, -1) * seen[..., None]
    out = weights.to(q.dtype) @ taken[0]
    return out, lse, _mass(weights.detach(), lse.detach(), rest)


def _mass(weights: Tensor, lse: Tensor, rest: Tensor | None) -> Tensor:
    """weights: [B, S, H, k], of the chosen alone; what else is in the denominator takes its share first."""
    if rest is None:
        return weights.sum(2)
    share = torch.sigmoid(lse - rest.detach().clamp_min(torch.finfo(lse.dtype).min))
    return (weights * share[..., None]).sum(2)
