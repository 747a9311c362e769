"""PyTorch's fused attention (FlashAttention-2, arXiv 2307.08691, or cuDNN's) where rows are one document, causal.

Everything else (packed documents, windows, cached entries, a log-sum-exp that is needed) goes to the blockwise core: a rule
of this file, stated when the core is chosen, not a fallback found out at run time.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from models.contract import Visibility
from models.cores import blockwise


def core(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float, *, lse: bool = False) -> tuple[Tensor, Tensor | None]:
    """See models.cores."""
    unbounded = visibility.reach is None or visibility.reach >= q.shape[1]
    if lse or not (visibility.aligned and visibility.single_document and unbounded):
        return blockwise.core(q, k, v, visibility, scale, lse=lse)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        is_causal=True,
        scale=scale,
        enable_gqa=k.shape[2] != q.shape[2],
    )
    return out.transpose(1, 2), None
