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

Core = Callable[..., tuple[Tensor, Tensor | None]]
Readable = tuple[Tensor, Tensor, Visibility]
"""Keys [B, T, K, d], values [B, T, K, e], and which query may read which."""
Partial = tuple[Tensor, Tensor]
"""Output [B, S, H, e] and log-sum-exp [B, S, H] over some of the entries."""


def read(core: Core, q: Tensor, readables: list[Readable], scale: float, sink: Tensor | None = None) -> Tensor:
    """q: [B, S, H, d]; sink: [H] or None. Returns [B, S, H, e], the softmax over all of `readables` together."""
    readables = [readable for readable in readables if readable[0].shape[1] > 0]
    if len(readables) == 1 and sink is None:
        k, v, visibility = readables[0]
        return core(q, k, v, visibility, scale)[0]
    return merge(parts(core, q, readables, scale), sink)


def parts(core: Core, q: Tensor, readables: list[Readable], scale: float) -> list[Partial]:
    """Of each readable that holds anything."""
    partials = []
    for k, v, visibility in readables:
        if k.shape[1] > 0:
            out, lse = core(q, k, v, visibility, scale, lse=True)
            assert lse is not None
            partials.append((out, lse))
    return partials


def log_mass(partials: list[Partial], sink: Tensor) -> Tensor:
    """Log-sum-exp [B, S, H] of all partials and the sink [H]: their share of a denominator."""
    lses = [lse for _, lse in partials]
    return torch.logsumexp(torch.stack([*lses, sink.to(lses[0].dtype).expand_as(lses[0])]), 0)


def merge(partials: list[Partial], sink: Tensor | None = None) -> Tensor:
    """One softmax of several, and a sink [H]. Returns [B, S, H, e]."""
    if not partials:
        raise ValueError("a query needs at least one piece to read")
    outs, lses = map(list, zip(*partials, strict=True))
    if sink is not None:
        lses.append(sink.to(lses[0].dtype).expand_as(lses[0]))
    lse_PBSH = torch.stack(lses)
    # -inf - -inf is NaN: a query that sees nothing anywhere is measured against 0 instead
    highest = lse_PBSH.detach().amax(0).clamp_min(torch.finfo(lse_PBSH.dtype).min)
    weight = torch.exp(lse_PBSH - highest)
    weight = weight / weight.sum(0).clamp_min(torch.finfo(weight.dtype).tiny)
    merged = sum(out * w[..., None] for out, w in zip(outs, weight, strict=False))
    assert isinstance(merged, Tensor)
    return merged.to(outs[0].dtype)
