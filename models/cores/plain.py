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
    scores = (q_BKNd @ k.permute(0, 2, 3, 1)).to(full_precision(q.dtype)).unflatten(2, (-1, length)) * scale
    mask = visibility.mask()[:, None, None]
    scores = scores.masked_fill(~mask, float("-inf"))
    seen = mask.any(-1)
    # a row without a visible entry would be softmax of -inf alone: NaN in the output and, worse, in the gradient
    safe = scores.masked_fill(~seen[..., None], 0.0)
    weights = (torch.softmax(safe, -1) * seen[..., None]).to(v.dtype)
    out = (weights.flatten(2, 3) @ v.permute(0, 2, 1, 3)).unflatten(2, (-1, length))
    out = out.permute(0, 3, 1, 2, 4).flatten(2, 3)
    if not lse:
        return out, None
    return out, torch.logsumexp(safe, -1).masked_fill(~seen, float("-inf")).permute(0, 3, 1, 2).flatten(2, 3)
