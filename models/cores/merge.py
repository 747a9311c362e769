"""One softmax over entries that lie in several pieces or slots, and over a sink, by their log-sum-exps.

The identity is the one that FlashAttention uses over blocks (arXiv 2205.14135, section 3.1). A sink is a learned logit
per head that enters the denominator only (DeepSeek-V4 report, arXiv 2606.19348; gpt-oss): it is a piece without a
value.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from models.contract import Visibility
from models.linear import full_precision

Core = Callable[..., tuple[Tensor, Tensor | None]]
Readable = tuple[Tensor, Tensor, Visibility]
"""Keys [B, T, K, d], values [B, T, K, e], and which query may read which."""


def read(core: Core, q: Tensor, readables: list[Readable], scale: float, sink: Tensor | None = None) -> Tensor:
    """q: [B, S, H, d]; sink: [H] or None. Returns [B, S, H, e], the softmax over all of `readables` together."""
    readables = [readable for readable in readables if readable[0].shape[1] > 0]
    if not readables:
        raise ValueError("a query needs at least one piece to read")
    if len(readables) == 1 and sink is None:
        k, v, visibility = readables[0]
        return core(q, k, v, visibility, scale)[0]
    outs, lses = [], []
    for k, v, visibility in readables:
        out, lse = core(q, k, v, visibility, scale, lse=True)
        assert lse is not None
        outs.append(out)
        lses.append(lse)
    if sink is not None:
        lses.append(sink.to(full_precision(q.dtype)).expand_as(lses[0]))
    lse_PBSH = torch.stack(lses)
    # -inf - -inf is NaN: a query that sees nothing anywhere is measured against 0 instead
    highest = lse_PBSH.detach().amax(0).clamp_min(torch.finfo(lse_PBSH.dtype).min)
    weight = torch.exp(lse_PBSH - highest)
    weight = weight / weight.sum(0).clamp_min(torch.finfo(weight.dtype).tiny)
    merged = sum(out * w[..., None] for out, w in zip(outs, weight, strict=False))
    assert isinstance(merged, Tensor)
    return merged.to(q.dtype)
