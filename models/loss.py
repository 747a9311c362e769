"""Cross-entropy over chunks of tokens, forward and backward, without logits of all tokens at once.

The gradient of the logits is known as soon as they are, so each chunk's part of both gradients is made in the forward
and its logits are dropped (Liger, arXiv 2410.10989, section 3.2).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from models.linear import full_precision

IGNORE = -100
"""The target of a token that is not scored."""

CHUNK_NUMBERS = 2**26
"""Logits held at once: 256 MiB in fp32."""


def chunk_length(num_tokens: int, vocab: int) -> int:
    """Tokens of a chunk."""
    return max(1, min(num_tokens, CHUNK_NUMBERS // vocab))


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """cap · tanh(logits / cap), within ± cap (Gemma 2, arXiv 2408.00118, section 2), in fp32; None caps nothing."""
    wide = logits.to(full_precision(logits.dtype))
    return wide if cap is None else cap * torch.tanh(wide / cap)


def _loss_and_gradient(logits: Tensor, target: Tensor, cap: float | None) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies of logits [N, V], capped, in fp32, and its gradient in the logits' dtype."""
    wide = capped(logits, cap)
    scored = target != IGNORE
    index = target.clamp_min(0)[:, None]
    lse = torch.logsumexp(wide, -1, keepdim=True)
    loss = ((lse - wide.gather(1, index)).squeeze(1) * scored).sum()
    hit = torch.arange(logits.shape[1], device=logits.device) == index
    gradient = (torch.exp(wide - lse) - hit.to(wide.dtype)) * scored[:, None]
    if cap is not None:
        gradient = gradient * (1 - (wide / cap).square())
    return loss, gradient.to(logits.dtype)


@functools.cache
def _fused() -> Callable[[Tensor, Tensor, float | None], tuple[Tensor, Tensor]]:
    """On a GPU: one pass over the logits instead of seven. On first use, because torch.compile takes seconds to
    load."""
    return torch.compile(_loss_and_gradient, dynamic=False)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, cap: float | None) -> Tensor:
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        compute = weight.to(hidden.dtype)
        wide = full_precision(hidden.dtype)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        differentiate = _fused() if hidden.is_cuda else _loss_and_gradient
        step = chunk_length(hidden.shape[0], weight.shape[0])
        for start in range(0, hidden.shape[0], step):
            rows, target = hidden[start : start + step], targets[start : start + step]
            loss, grad = differentiate(F.linear(rows, compute), target, cap)
            total += loss
            if grad_hidden is not None:
                grad_hidden[start : start + step] = grad @ compute
            if grad_weight is not None:
                grad_weight += grad.T @ rows
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grads[0]
        if grad_hidden is not None:
            grad_hidden = grad_hidden * scale.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * scale).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, cap: float | None = None) -> Tensor:
    """Sum of the cross-entropies in nats of the scored tokens, one fp32 scalar.

    hidden: [N, D]; weight: [V, D]; targets: [N], IGNORE where not scored; cap: of the logits.
    """
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, targets, cap)
    return loss


@torch.no_grad()
def score(hidden: Tensor, weight: Tensor, targets: Tensor, cap: float | None = None) -> tuple[Tensor, Tensor]:
    """Per token: its cross-entropy in nats (0 where not scored), and whether the target has the highest logit. Both
    [N]."""
    losses, hits = [], []
    step = chunk_length(hidden.shape[0], weight.shape[0])
    for rows, target in zip(hidden.split(step), targets.split(step), strict=True):
        logits = capped(F.linear(rows, weight.to(rows.dtype)), cap)
        losses.append(F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none"))
        hits.append(logits.argmax(-1) == target)
    return torch.cat(losses), torch.cat(hits)
