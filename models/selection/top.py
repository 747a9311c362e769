"""The k highest of each query's scores, the same on every device and in every layout."""

from __future__ import annotations

import torch
from torch import Tensor

NOWHERE = -1
"""The place of an entry that was not chosen, because fewer than k were visible."""


@torch.no_grad()
def top(scores: Tensor, mask: Tensor, k: int) -> Tensor:
    """Places of the k highest of `scores` [B, S, T] among those where `mask` is True. Returns [B, S, k] int64.

    In ascending order of place, NOWHERE after the last. Equal scores go to the lowest place: `torch.topk` would leave
    it to chance, and ReLU makes many exact zeros. T may be less than k.
    """
    num_entries = scores.shape[-1]
    hidden = scores.masked_fill(~mask, float("-inf"))
    lowest = torch.topk(hidden, min(k, num_entries), -1).values[..., -1:]
    above, equal = hidden > lowest, hidden == lowest
    room = k - above.sum(-1, keepdim=True)
    chosen = (above | (equal & (equal.cumsum(-1) <= room))) & mask
    rank = torch.where(chosen, chosen.cumsum(-1) - 1, k)
    places = torch.full((*scores.shape[:-1], k + 1), NOWHERE, dtype=torch.int64, device=scores.device)
    index = torch.arange(num_entries, device=scores.device).expand_as(rank)
    return places.scatter(-1, rank, index)[..., :k]
