"""Tokens to the order of their experts and back, deterministic both ways: no atomic adds in the backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Order(NamedTuple):
    """order: [N·k], which token copy stands at each sorted place. place: its inverse. load: [E], copies per expert."""

    order: Tensor
    place: Tensor
    load: Tensor


def by_expert(experts: Tensor, num_experts: int) -> Order:
    """experts: [N, k], the choices of each token. Dropless: every copy has a place."""
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    places = torch.arange(flat.numel(), device=flat.device)
    place = torch.empty_like(order).scatter(0, order, places)
    load = torch.zeros(num_experts, dtype=torch.int64, device=flat.device).scatter_add(0, flat, torch.ones_like(flat))
    return Order(order, place, load)


class _Spread(torch.autograd.Function):
    """[N, D] to its k copies in sorted order; the backward gathers the copies of each token and sums them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, place: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(place)
        ctx.copies = copies
        return x[order // copies]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (place,) = ctx.saved_tensors
        return grads[0][place].unflatten(0, (-1, ctx.copies)).sum(1), None, None, None


class _Permute(torch.autograd.Function):
    """rows[index] for a permutation; the backward is its inverse."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows[index]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0][inverse], None, None


def spread(x: Tensor, order: Order) -> Tensor:
    """x: [N, D]. Returns [N·k, D], sorted by expert."""
    copies = order.order.numel() // x.shape[0]
    return _Spread.apply(x, order.order, order.place, copies)


def gather(rows: Tensor, weights: Tensor, order: Order) -> Tensor:
    """rows: [N·k, D], sorted by expert; weights: [N, k]. Returns [N, D], each token's weighted sum, added in fp32."""
    copies: Tensor = _Permute.apply(rows, order.place, order.order)
    copies = copies.unflatten(0, weights.shape)
    return (copies * weights[..., None]).sum(1).to(rows.dtype)
