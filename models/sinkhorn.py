"""Sinkhorn's normalisation (Sinkhorn and Knopp, 1967), columns and rows in turn, as one operation.

A compiler would unroll it: forty divisions, each by sums over what the one before gave, were up to half of a layer's
graph, forward and backward. As an operation of its own it is one node, whatever the rounds; and
instead of forty small matrices only what they were divided by is kept for the backward.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

_ROWS, _COLUMNS = -1, -2


def balanced(matrix: Tensor, rounds: int, eps: float) -> Tensor:
    """matrix: [..., n, n], positive, its rows already divided by their sums: the first half of `rounds`' first.

    Ends with the columns. eps: added to each sum. Returns as many numbers, in the same dtype.
    """
    return cast(Tensor, torch.ops.keyhole.balanced(matrix, rounds, eps)[0])


def _balanced(matrix: Tensor, rounds: int, eps: float) -> tuple[Tensor, Tensor]:
    """Also by what was divided, [2 · rounds - 1, ..., n]."""
    matrix, divisors = matrix.contiguous(), []
    for dim in _turns(rounds):
        divisors.append(matrix.sum(dim) + eps)
        matrix = matrix / divisors[-1].unsqueeze(dim)
    return matrix, torch.stack(divisors)


def _gradient(gradient: Tensor, matrix: Tensor, divisors: Tensor) -> Tensor:
    """Of the loss by what `_balanced` was given, from that by its result. Each division is taken back on the way."""
    gradient, turns = gradient.contiguous(), _turns((len(divisors) + 1) // 2)
    for dim, divisor in zip(reversed(turns), reversed(divisors.unbind()), strict=True):
        by = divisor.unsqueeze(dim)
        gradient = (gradient - (gradient * matrix).sum(dim, keepdim=True)) / by
        matrix = matrix * by
    return gradient


def _turns(rounds: int) -> list[int]:
    """The dims that are summed over, one after another."""
    return [_COLUMNS, *[_ROWS, _COLUMNS] * (rounds - 1)]


def _like(gradient: Tensor, matrix: Tensor, divisors: Tensor) -> Tensor:
    return gradient.new_empty(gradient.shape)


def _shapes(matrix: Tensor, rounds: int, eps: float) -> tuple[Tensor, Tensor]:
    return matrix.new_empty(matrix.shape), matrix.new_empty(len(_turns(rounds)), *matrix.shape[:-1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output)


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.keyhole.balanced_gradient(gradient, *ctx.saved_tensors), None, None


_LIBRARY = torch.library.Library("keyhole", "FRAGMENT")
_LIBRARY.define("balanced(Tensor matrix, int rounds, float eps) -> (Tensor, Tensor)")
_LIBRARY.define("balanced_gradient(Tensor gradient, Tensor matrix, Tensor divisors) -> Tensor")
_LIBRARY.impl("balanced", _balanced, "CompositeExplicitAutograd")
_LIBRARY.impl("balanced_gradient", _gradient, "CompositeExplicitAutograd")
torch.library.register_fake("keyhole::balanced", _shapes, lib=_LIBRARY)
torch.library.register_fake("keyhole::balanced_gradient", _like, lib=_LIBRARY)
torch.library.register_autograd("keyhole::balanced", _differentiate, setup_context=_keep, lib=_LIBRARY)
