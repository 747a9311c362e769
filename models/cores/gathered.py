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


def core(
    q: Tensor, k: Tensor, value_dim: int, places: Tensor, scale: float, rest: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """q: [B, S, H, d]; k: [B, T, d], whose first `value_dim` numbers are the value; places: [B, S, k] into T.

    rest: [B, S, H], log-sum-exp of whatever else is in the softmax's denominator (a window, a sink).
    Returns the output [B, S, H, value_dim] and log-sum-exp [B, S, H] over the chosen alone, and their mass
    [B, S, k]: the probability that each chosen entry has in the whole softmax, summed over heads, without a gradient.
    """
    num_rows, length, heads, size = q.shape
    step = max(1, TILE_NUMBERS // max(1, num_rows * places.shape[2] * max(size, heads)))
    if length <= step:
        return _tile(q, k, value_dim, places, scale, rest)
    results = []
    for start in range(0, length, step):
        part = slice(start, start + step)
        cut = None if rest is None else rest[:, part]
        results.append(
            checkpoint(
                _tile,
                q[:, part],
                k,
                value_dim,
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
    q: Tensor, k: Tensor, value_dim: int, places: Tensor, scale: float, rest: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    keys, mask = take(k, places), present(places)[:, :, None]
    scores = (q @ keys.transpose(-1, -2)).to(full_precision(q.dtype)) * scale
    seen = mask.any(-1)
    # a query that chose nothing would be softmax of -inf alone
    safe = scores.masked_fill(~mask, float("-inf")).masked_fill(~seen[..., None], 0.0)
    lse = torch.logsumexp(safe, -1).masked_fill(~seen, float("-inf"))
    weights = torch.softmax(safe, -1) * seen[..., None]
    out = weights.to(q.dtype) @ keys[..., :value_dim]
    return out, lse, _mass(weights.detach(), lse.detach(), rest)


def _mass(weights: Tensor, lse: Tensor, rest: Tensor | None) -> Tensor:
    """weights: [B, S, H, k], of the chosen alone; what else is in the denominator takes its share first."""
    if rest is None:
        return weights.sum(2)
    share = torch.sigmoid(lse - rest.detach().clamp_min(torch.finfo(lse.dtype).min))
    return (weights * share[..., None]).sum(2)
