"""Manifold-constrained hyper-connections (mHC, arXiv 2512.24880; DeepSeek-V4 report, arXiv 2606.19348, section 2.2).

A token has n streams instead of one. A sublayer reads a weighted sum of them and writes back to each; between, the
streams are mixed by a doubly stochastic matrix, so that nothing grows or fades however deep the model is. All weights
are functions of the token. The matrix is indexed [source, destination], as in DeepSeek's code; the papers write its
transpose.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from conf.schema import at_least
from models import contract
from models.linear import full_precision
from models.parameter import Module
from models.sinkhorn import balanced

GATE = 0.01
"""α at the start (arXiv 2512.24880, table of hyper-parameters)."""

APART = -8.0
"""Logit between two different streams at the start; of a stream with itself it is 0.

The reports do not publish it. At 0 the matrix is uniform and averages the streams at every sublayer, so that what
distinguishes them is gone after a few; at −8 it is the identity to 0.1 %.
"""


@dataclass(frozen=True)
class Config:
    """rounds: of Sinkhorn's normalisation. eps: added to what is divided by there, and to the reading weights."""

    streams: int = 4
    rounds: int = 20
    eps: float = 1e-6
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.streams < 2:
            raise ValueError(f"streams ({self.streams}) must be at least 2; use the plain residual for one")
        if self.rounds < 1:
            raise ValueError(f"rounds ({self.rounds}) must be at least 1")
        at_least(0, self, "eps", "norm_eps")

    def build(self, width: int) -> Residual:
        return Residual(self, width)

    def ends(self, width: int) -> Ends:
        return Ends(self, width)


class Coefficients(Module):
    """A token's streams to a few numbers, in groups: α φ x̂ + b, where x̂ is all streams in one vector, divided by its
    rms. Computed in fp32."""

    projection: Tensor
    gate: Tensor
    bias: Tensor

    def __init__(self, config: Config, width: int, start: tuple[Tensor, ...]) -> None:
        """start: each group's biases; they alone decide the weights as long as the gates are small."""
        super().__init__()
        self.inputs, self.norm_eps = config.streams * width, config.norm_eps
        self.sizes = tuple(len(group) for group in start)
        rows = sum(self.sizes)
        self.declare("projection", (rows, self.inputs), ("mixes", "width"), "projection", fp32=True, split=self.sizes)
        self.declare("gate", (len(start),), ("one",), "gain", fp32=True, start=lambda gate: gate.fill_(GATE))
        self.declare("bias", (rows,), ("mixes",), "bias", fp32=True, start=lambda bias: bias.copy_(torch.cat(start)))

    def forward(self, streams: Tensor) -> list[Tensor]:
        """streams: [B, S, n, D]. Returns each group's numbers, [B, S, size], in fp32."""
        dtype = full_precision(streams.dtype)
        flat = streams.flatten(-2).to(dtype)
        # the norm divides the products, which are few, and not the streams
        rms = (flat.square().mean(-1, keepdim=True) + self.norm_eps).sqrt()
        mixes = (F.linear(flat, self.projection.to(dtype)) / rms).split(self.sizes, -1)
        gates, biases = self.gate.to(dtype).unbind(), self.bias.to(dtype).split(self.sizes)
        return [gate * mix + bias for gate, mix, bias in zip(gates, mixes, biases, strict=True)]

    def flops(self) -> float:
        """Per token."""
        return 2.0 * self.inputs * sum(self.sizes)


class Residual(contract.Residual):
    """Around one sublayer: what it reads of the streams, what it writes to each, and how they are mixed."""

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.config, n = config, config.streams
        apart = (APART * (1 - torch.eye(n, device="cpu"))).flatten()
        self.coefficients = Coefficients(config, width, (_mean(n), torch.zeros(n, device="cpu"), apart))

    def read(self, residual: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """residual: [B, S, n, D]. The carry: the weights of writing [B, S, n], and the mixing matrices [B, S, n, n]."""
        pre, post, mix = self.coefficients(residual)
        n = self.config.streams
        matrix = sinkhorn(mix.unflatten(-1, (n, n)), self.config.rounds, self.config.eps)
        return _weighted(pre, residual, self.config.eps), (2 * torch.sigmoid(post), matrix)

    def write(self, residual: Tensor, carry: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        """Stream k becomes post_k · y + Σ_j matrix_jk · stream_j, summed in fp32."""
        post, matrix = carry
        written = post[..., None] * y[..., None, :].to(post.dtype)
        # n² multiply-adds a number, too few for a matrix product: as a sum they are one pass once compiled
        for weights, stream in zip(matrix.unbind(-2), residual.unbind(-2), strict=True):
            written = written + weights[..., None] * stream[..., None, :].to(post.dtype)
        return written.to(residual.dtype)

    def flops(self) -> float:
        return self.coefficients.flops()


class Ends(contract.Ends):
    """Every stream starts as the embedding; at the end the streams are summed, each with a weight of its own."""

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.config, self.streams = config, config.streams
        self.coefficients = Coefficients(config, width, (_mean(config.streams),))

    def enter(self, embedded: Tensor) -> Tensor:
        return embedded.unsqueeze(-2).expand(-1, -1, self.config.streams, -1)

    def leave(self, residual: Tensor) -> Tensor:
        (weights,) = self.coefficients(residual)
        return _weighted(weights, residual, self.config.eps)

    def flops(self) -> float:
        return self.coefficients.flops()


def sinkhorn(logits: Tensor, rounds: int, eps: float) -> Tensor:
    """Logits [..., source, destination] to a matrix whose rows and columns sum to 1 (Sinkhorn and Knopp, 1967).

    Rows, then columns, `rounds` times, as DeepSeek's code does it: the first rows by a softmax, the columns last. So
    every destination is a convex combination of the sources (to eps); the rows sum to 1 as nearly as the rounds allow.
    """
    return balanced(logits.softmax(-1) + eps, rounds, eps)


def _weighted(logits: Tensor, streams: Tensor, eps: float) -> Tensor:
    """Σ_j (σ(logits_j) + eps) · stream_j, in fp32; the weights need not sum to one."""
    weights = torch.sigmoid(logits) + eps
    return (weights[..., None] * streams.to(weights.dtype)).sum(-2).to(streams.dtype)


def _mean(n: int) -> Tensor:
    """Logits with which n streams are averaged."""
    return torch.full((n,), -math.log(n - 1), device="cpu")
