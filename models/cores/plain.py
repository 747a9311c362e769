"""Softmax attention as written in arXiv 1706.03762, section 3.2.1: all scores at once. The twin of every other core."""

from __future__ import annotations

import torch
from torch import Tensor

from models.contract import Visibility
from models.linear import full_precision


def core(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float, *, lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """See models.cores. Holds [B, H, S, T] in fp32."""
    length, num_kv_heads = q.shape[1], k.shape[2]
    # the G heads of a KV head are rows of one product: as a batch dim they would broadcast, and copy the entries G
    # times
    q_BKNd = q.unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    scores = ((q_BKNd * scale) @ k.permute(0, 2, 3, 1)).to(full_precision(q.dtype)).unflatten(2, (-1, length))
    mask = visibility.mask()[:, None, None]
    # of a row without a visible entry the softmax of -inf alone would be NaN, in the gradient too
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, -1).to(v.dtype)
    out = (weights.flatten(2, 3) @ v.permute(0, 2, 1, 3)).unflatten(2, (-1, length))
    sees_nothing = ~mask.any(-1)
    out = out.masked_fill(sees_nothing[..., None], 0.0).permute(0, 3, 1, 2, 4).flatten(2, 3)
    if not lse:
        return out, None
    return out, torch.logsumexp(scores, -1).masked_fill(sees_nothing, float("-inf")).permute(0, 3, 1, 2).flatten(2, 3)
