"""Manifold-constrained hyper-connections: their equations stream by stream, and the stability that they are for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from conf import schema
from models import mechanism
from models.box import whole
from models.initial import fill
from models.parameter import Parametrization, named_specs
from models.residual.mhc import sinkhorn

EPS = 1e-6
SUBLAYERS = 122
"""Of DeepSeek-V4-Pro."""


def build(width: int = 8, **keys: Any) -> Any:
    config = mechanism.config_of("residual", {"scheme": "mhc", **keys}, "model.residual")
    return config.build(width).double(), config.ends(width).double()


def initialised(width: int, seed: int = 0) -> Any:
    """As a model starts it; φ so wide that φ x̂ has the deviation that 0.006 gives at DeepSeek-V4-Pro's 4 × 7,168."""
    residual, _ = build(width)
    std = 0.006 * math.sqrt(7168 / width)
    with torch.no_grad():
        for name, parameter, spec in named_specs(residual):
            fill(whole(parameter), spec, Parametrization(std=std), seed, name)
    return residual


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def balanced(logits: list[list[float]], rounds: int) -> list[list[float]]:
    """exp, then rows and columns in turn, each to a sum of one; no eps."""
    n = len(logits)
    matrix = [[math.exp(x) for x in row] for row in logits]
    for _ in range(rounds):
        matrix = [[x / sum(row) for x in row] for row in matrix]
        columns = [sum(matrix[j][k] for j in range(n)) for k in range(n)]
        matrix = [[matrix[j][k] / columns[k] for k in range(n)] for j in range(n)]
    return matrix


@pytest.mark.parametrize(("streams", "rounds"), [(4, 20), (3, 1), (2, 5)])
def test_mhc_is_its_equations(streams: int, rounds: int) -> None:
    """Token by token and stream by stream; a transposed matrix, or groups in another order, would differ by O(1)."""
    n, width = streams, 5
    residual, ends = build(width, streams=n, rounds=rounds)
    with torch.no_grad():
        for parameter in [*residual.parameters(), *ends.parameters()]:
            parameter.normal_(0.2, 0.7)
    streams_in = torch.randn(2, 3, n, width, dtype=torch.float64)
    y = torch.randn(2, 3, width, dtype=torch.float64)
    u, carry = residual.read(streams_in)
    out, left = residual.write(streams_in, carry, y), ends.leave(streams_in)
    c, h = residual.coefficients, ends.coefficients
    for b in range(2):
        for t in range(3):
            x = streams_in[b, t]
            unit = x.flatten() / (x.square().mean() + EPS).sqrt()
            r, gate, bias = (c.projection @ unit).tolist(), c.gate.tolist(), c.bias.tolist()
            pre = [sigmoid(gate[0] * r[j] + bias[j]) + EPS for j in range(n)]
            post = [2 * sigmoid(gate[1] * r[n + j] + bias[n + j]) for j in range(n)]
            at = [[2 * n + n * j + k for k in range(n)] for j in range(n)]
            mix = balanced([[gate[2] * r[i] + bias[i] for i in row] for row in at], rounds)
            expected_u = sum(p * stream for p, stream in zip(pre, x, strict=True))
            torch.testing.assert_close(u[b, t], expected_u)
            for k in range(n):
                expected = post[k] * y[b, t] + sum(mix[j][k] * x[j] for j in range(n))
                # eps is in the code's normalisation, not in the equations
                torch.testing.assert_close(out[b, t, k], expected, rtol=2e-5, atol=2e-5)
            r, gate, bias = (h.projection @ unit).tolist(), h.gate.tolist(), h.bias.tolist()
            weights = [sigmoid(gate[0] * r[j] + bias[j]) + EPS for j in range(n)]
            torch.testing.assert_close(left[b, t], sum(w * stream for w, stream in zip(weights, x, strict=True)))


def test_streams_start_as_the_embedding() -> None:
    _, ends = build(8)
    embedded = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    streams = ends.enter(embedded)
    assert streams.shape == (2, 3, 4, 8)
    assert all(torch.equal(stream, embedded) for stream in streams.unbind(2))
    (gradient,) = torch.autograd.grad(streams.sum(), embedded)
    assert (gradient == 4).all()


@pytest.mark.parametrize(("std", "rounds", "least", "most"), [(1, 20, 0, 5e-4), (3, 20, 1e-2, 0.1), (1, 1, 0.3, 1.0)])
def test_mixing_is_doubly_stochastic(std: float, rounds: int, least: float, most: float) -> None:
    """Destinations are convex combinations to 1e-5; sources as the rounds allow: at worst 2e-4, 4e-2, 0.65."""
    logits = std * torch.randn(2000, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = sinkhorn(logits, rounds, EPS)
    assert (matrix >= 0).all()
    assert (matrix.sum(-2) - 1).abs().max() < 1e-5
    assert least <= (matrix.sum(-1) - 1).abs().max() <= most


def divided(matrix: Tensor, rounds: int) -> Tensor:
    """The divisions one after another, for autograd to follow."""
    for dim in [-1, *[-2, -1] * rounds][1 : 2 * rounds]:
        matrix = matrix / (matrix.sum(dim, keepdim=True) + EPS)
    return matrix


@pytest.mark.parametrize(("streams", "rounds", "std"), [(4, 20, 1), (4, 20, 30), (3, 1, 1), (2, 5, 6)])
def test_mixing_has_the_gradient_of_its_divisions(streams: int, rounds: int, std: float) -> None:
    """Also where entries vanish, and for a gradient that is expanded or lies in another order."""
    logits = (std * torch.randn(5, 7, streams, streams, dtype=torch.float64)).requires_grad_()
    probe = torch.randn(streams, streams, dtype=torch.float64)
    found, wanted = sinkhorn(logits, rounds, EPS), divided(logits.softmax(-1) + EPS, rounds)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    for matrix in (probe.expand_as(found), torch.randn_like(found).transpose(0, 1).contiguous().transpose(0, 1)):
        gradients = [torch.autograd.grad(mixed, logits, matrix, retain_graph=True)[0] for mixed in (found, wanted)]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-13)


def test_more_rounds_make_no_larger_graph() -> None:
    """Unrolled, half of a layer's graph would be divisions."""

    def nodes(rounds: int) -> int:
        def both(logits: Tensor) -> Tensor:
            leaf = logits.detach().requires_grad_()
            return torch.autograd.grad(sinkhorn(leaf, rounds, EPS).square().sum(), leaf)[0]

        return len(make_fx(both, tracing_mode="fake")(torch.randn(3, 4, 4)).graph.nodes)

    assert nodes(20) == nodes(1)


def mixings(std: float, depth: int) -> list[Tensor]:
    """The matrices of `depth` sublayers, 64 tokens each, their logits of deviation `std`."""
    generator = torch.Generator().manual_seed(0)
    return [
        sinkhorn(std * torch.randn(64, 4, 4, dtype=torch.float64, generator=generator), 20, EPS) for _ in range(depth)
    ]


@pytest.mark.parametrize("std", [0.5, 1.0, 3.0])
def test_the_gain_of_a_hundred_sublayers_is_near_one(std: float) -> None:
    """Forward (into a destination) and backward (out of a source); 3 is far from where training starts.

    The paper saw at most 1.6 for mHC, and 3,000 for unconstrained hyper-connections, whose matrices need not sum to 1.
    """
    product = torch.eye(4, dtype=torch.float64).expand(64, 4, 4)
    for matrix in mixings(std, 100):
        product = product @ matrix
    forward, backward = product.abs().sum(-2), product.abs().sum(-1)
    assert (forward - 1).abs().max() < 1e-3
    assert backward.min() > 0.6
    assert backward.max() < 1.6


def spread(streams: Tensor) -> float:
    """Share of the streams' variance that lies between streams of one token."""
    centred = streams - streams.mean(2, keepdim=True)
    return float(centred.square().mean() / streams.square().mean())


@torch.no_grad()
def deep(streams: Tensor, residuals: list[Any], seed: int = 3) -> Tensor:
    """Through sublayers that answer with noise of the size of their input."""
    generator = torch.Generator().manual_seed(seed)
    for residual in residuals:
        u, carry = residual.read(streams)
        noise = torch.randn(u.shape, dtype=u.dtype, generator=generator)
        streams = residual.write(streams, carry, noise)
    return streams


def test_streams_do_not_collapse_at_the_start_of_training() -> None:
    """What differs between streams survives all sublayers of the largest model; a uniform matrix would erase it."""
    width = 64
    residuals = [initialised(width, seed) for seed in range(SUBLAYERS)]
    apart = torch.randn(1, 8, 4, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    centred = apart - apart.mean(2, keepdim=True)

    def kept(residuals: list[Any]) -> float:
        """Share of the difference that is still there, its direction included, when all sublayers answer nothing."""
        streams = apart
        with torch.no_grad():
            for residual in residuals:
                u, carry = residual.read(streams)
                streams = residual.write(streams, carry, torch.zeros_like(u))
        return float((streams * centred).sum() / centred.square().sum())

    assert kept(residuals) > 0.8
    for residual in residuals:
        with torch.no_grad():
            residual.coefficients.bias[8:] = 0.0
    assert abs(kept(residuals)) < 1e-12


@pytest.mark.parametrize(
    ("gate", "apart", "least", "most"),
    [
        pytest.param(0.01, True, 3e-6, 5e-5, id="as it starts"),
        pytest.param(0.01, False, 0.0, 1e-5, id="uniform matrix"),
        pytest.param(1.0, True, 1e-2, 0.5, id="wide gates"),
        pytest.param(1.0, False, 0.0, 2e-3, id="wide gates, uniform matrix"),
    ],
)
def test_streams_part_from_each_other(gate: float, apart: bool, least: float, most: float) -> None:
    """From copies of one embedding, after 122 sublayers: of the order of 1e-5 of the variance, 5e-2 once the
    gates have opened; with a uniform matrix below 1e-5, and 6e-4."""
    width = 64
    residuals = [initialised(width, seed) for seed in range(SUBLAYERS)]
    for residual in residuals:
        with torch.no_grad():
            residual.coefficients.gate.fill_(gate)
            if not apart:
                residual.coefficients.bias[8:] = 0.0
    start = torch.randn(1, 16, 1, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert least <= spread(deep(start.expand(-1, -1, 4, -1), residuals)) <= most


def test_a_model_starts_as_one_with_a_plain_residual() -> None:
    """Reading averages copies, writing adds once to each, and nothing is mixed: the same function to the gates' 1 %."""
    residual = initialised(8)
    x, y = torch.randn(1, 5, 8, dtype=torch.float64), torch.randn(1, 5, 8, dtype=torch.float64)
    streams = x.unsqueeze(2).expand(-1, -1, 4, -1)
    u, carry = residual.read(streams)
    torch.testing.assert_close(u, x, rtol=1e-2, atol=1e-3)
    out = residual.write(streams, carry, y)
    torch.testing.assert_close(out, (x + y).unsqueeze(2).expand_as(out), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("keys", "words"), [({"streams": 1}, "streams"), ({"rounds": 0}, "rounds")])
def test_an_impossible_residual_is_refused(keys: dict[str, int], words: str) -> None:
    with pytest.raises(schema.Refused, match=words):
        build(**keys)
