"""Schemes without an implementation elsewhere against their papers' equations, written token by token."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from models import mechanism
from models.sequence import Whole
from tests import schemes

WIDTH = 16


def softmax_read(query: Tensor, keys: list[Tensor], values: list[Tensor], size: int) -> Tensor:
    weights = (torch.stack(keys) @ query / math.sqrt(size)).softmax(0)
    return weights @ torch.stack(values)


def turned(x: Tensor, position: int, base: float = 10_000.0) -> Tensor:
    """Pairs (i, i + size/2) by position · base^(−2i/size)."""
    half = len(x) // 2
    angle = position * base ** (-2 * torch.arange(half, dtype=x.dtype) / len(x))
    a, b = x[:half], x[half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()))


def per_head_latent(layer: Any, x: Tensor) -> Tensor:
    """K and V of each KV head by their bottlenecks, expanded to whole heads before they are read."""
    c, outs = layer.config, []
    keys: list[list[Tensor]] = [[] for _ in range(c.kv_heads)]
    values: list[list[Tensor]] = [[] for _ in range(c.kv_heads)]
    for t, a in enumerate(x):
        low_keys, low_values = ((m.weight @ a).view(c.kv_heads, c.rank) for m in (layer.key, layer.value))
        for k in range(c.kv_heads):
            up_key, up_value = layer.key_expansion.weight[k], layer.value_expansion.weight[k]
            if c.rope_dim:
                keys[k].append(torch.cat((up_key @ low_keys[k], turned(layer.key_rope.weight @ a, t))))
            else:
                keys[k].append(turned(low_keys[k], t))
            values[k].append(up_value @ low_values[k])
        heads = []
        for h, query in enumerate((layer.query.weight @ a).view(c.heads, -1)):
            k = h // (c.heads // c.kv_heads)
            if c.rope_dim:
                query = torch.cat((query[: c.head_dim], turned(query[c.head_dim :], t)))
            else:
                query = turned(layer.key_expansion.weight[k].T @ query, t)
            heads.append(softmax_read(query, keys[k], values[k], c.head_dim + c.rope_dim))
        outs.append(layer.output.weight @ torch.cat(heads))
    return torch.stack(outs)


def gla(layer: Any, x: Tensor) -> Tensor:
    """MLA where there is one latent; a normalised latent is multiplied by √(width / size) where that is asked for."""
    c, outs = layer.config, []
    count = getattr(c, "latents", 1)

    def normalised(latents: Tensor, gain: Tensor) -> Tensor:
        unit = latents / (latents.square().mean(-1, keepdim=True) + c.latent_eps).sqrt()
        return unit * gain * (math.sqrt(WIDTH / latents.shape[-1]) if c.rescale else 1.0)

    keys: list[list[Tensor]] = [[] for _ in range(c.heads)]
    values: list[list[Tensor]] = [[] for _ in range(c.heads)]
    up = layer.expansion.weight.view(c.heads, c.nope_dim + c.value_dim, c.latent)
    for t, a in enumerate(x):
        made = layer.latent.weight @ a
        latents = normalised(made[: count * c.latent].view(count, c.latent), layer.latent_norm.gain)
        rotated = turned(made[count * c.latent :], t)
        low = a if c.query_latent is None else normalised(layer.query_down.weight @ a, layer.query_norm.gain)
        heads = []
        for h, query in enumerate((layer.query.weight @ low).view(c.heads, -1)):
            read = up[h] @ latents[h // (c.heads // count)]
            keys[h].append(torch.cat((read[: c.nope_dim], rotated)))
            values[h].append(read[c.nope_dim :])
            query = torch.cat((query[: c.nope_dim], turned(query[c.nope_dim :], t)))
            heads.append(softmax_read(query, keys[h], values[h], c.nope_dim + c.rope_dim))
        outs.append(layer.output.weight @ torch.cat(heads))
    return torch.stack(outs)


def gta(layer: Any, x: Tensor) -> Tensor:
    c, half, outs = layer.config, layer.config.head_dim // 2, []
    tied: list[list[Tensor]] = [[] for _ in range(c.kv_heads)]
    keys: list[list[Tensor]] = [[] for _ in range(c.kv_heads)]
    for t, a in enumerate(x):
        shared = turned(layer.key_rope.weight @ a, t)
        for k, state in enumerate((layer.tied.weight @ a).view(c.kv_heads, c.head_dim)):
            tied[k].append(state)
            keys[k].append(torch.cat((state[:half], shared)))
        heads = []
        for h, query in enumerate((layer.query.weight @ a).view(c.heads, c.head_dim)):
            k = h // (c.heads // c.kv_heads)
            query = torch.cat((query[:half], turned(query[half:], t)))
            heads.append(softmax_read(query, keys[k], tied[k], c.head_dim))
        outs.append(layer.output.weight @ torch.cat(heads))
    return torch.stack(outs)


def tpa(layer: Any, x: Tensor) -> Tensor:
    c, outs = layer.config, []
    keys: list[list[Tensor]] = [[] for _ in range(c.heads)]
    values: list[list[Tensor]] = [[] for _ in range(c.heads)]

    def product(factors: Any, a: Tensor, rank: int, turn: Callable[[Tensor], Tensor]) -> Tensor:
        by_head = (factors.by_head.weight @ a).view(rank, c.heads)
        by_dim = (factors.by_dim.weight @ a).view(rank, c.head_dim)
        total = torch.zeros(c.heads, c.head_dim, dtype=x.dtype)
        for r in range(rank):
            total = total + torch.outer(by_head[r], turn(by_dim[r])) / rank
        return total

    for t, a in enumerate(x):

        def turn(b: Tensor, position: int = t) -> Tensor:
            return turned(b, position)

        key, value = product(layer.key, a, c.key_rank, turn), product(layer.value, a, c.value_rank, lambda b: b)
        for h in range(c.heads):
            keys[h].append(key[h])
            values[h].append(value[h])
        if c.query_rank is None:
            query = torch.stack([turn(q) for q in (layer.query.weight @ a).view(c.heads, c.head_dim)])
        else:
            query = product(layer.query, a, c.query_rank, turn)
        heads = [softmax_read(query[h], keys[h], values[h], c.head_dim) for h in range(c.heads)]
        outs.append(layer.output.weight @ torch.cat(heads))
    return torch.stack(outs)


@pytest.mark.parametrize(
    ("plan", "equations"),
    [
        pytest.param(schemes.per_head_latent(), per_head_latent, id="per-head latent"),
        pytest.param(schemes.per_head_latent(rope_dim=0, rank=4), per_head_latent, id="per-head latent, rotated"),
        pytest.param(schemes.gla(rope={"pairing": "half"}), gla, id="gla"),
        pytest.param(schemes.gla(latents=4, rope={"pairing": "half"}), gla, id="gla, a latent a head"),
        pytest.param(schemes.gla(rescale=True, query_latent=7, rope={"pairing": "half"}), gla, id="gla, rescaled"),
        pytest.param(schemes.mla(rescale=True, query_latent=7, rope={"pairing": "half"}), gla, id="mla, rescaled"),
        pytest.param(schemes.gta(), gta, id="gta"),
        pytest.param(schemes.gta(kv_heads=1, head_dim=12), gta, id="gta, one state"),
        pytest.param(schemes.tpa(), tpa, id="tpa"),
        pytest.param(schemes.tpa(query_rank=None, key_rank=1, value_rank=1), tpa, id="tpa, full query, rank 1"),
    ],
)
def test_a_scheme_is_its_equations(plan: schemes.Plan, equations: Callable[[Any, Tensor], Tensor]) -> None:
    attention = mechanism.config_of("attention", plan, "row").build(WIDTH).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, 0.3, 0.5)
    x = torch.randn(11, WIDTH, dtype=torch.float64)
    sequence = Whole.rows(1, len(x))
    query, state = attention.compress(x[None], sequence)
    ours = attention.attend(query, sequence.collect(attention.slots(), state), sequence).y[0]
    theirs = equations(attention, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    seed = torch.randn_like(theirs)
    parameters = dict(attention.named_parameters())
    gradients = torch.autograd.grad((ours * seed).sum(), list(parameters.values()))
    expected = torch.autograd.grad((theirs * seed).sum(), list(parameters.values()))
    for name, gradient, wanted in zip(parameters, gradients, expected, strict=True):
        assert torch.allclose(gradient, wanted, rtol=1e-8, atol=1e-8), name


@pytest.mark.parametrize("rescale", [False, True], ids=["as published", "rescaled"])
def test_rescaled_latents_make_keys_as_large_as_the_rotated_one(rescale: bool) -> None:
    """Before training; otherwise the two parts of a key differ by √(width / latent), here 4."""
    plan = schemes.mla(latent=16, query_latent=16, nope_dim=32, rope_dim=32, rescale=rescale)
    attention = mechanism.config_of("attention", plan, "row").build(256).double()
    for name, parameter in attention.named_parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.02) if name.endswith("weight") else torch.nn.init.ones_(parameter)
    x, sequence = torch.randn(1, 64, 256, dtype=torch.float64), Whole.rows(1, 64)
    with torch.no_grad():
        query, state = attention.compress(x, sequence)
        nope, rope = attention.expand(state["latent"])[0].split((32, 32), -1)
    wanted = 1.0 if rescale else 0.25
    assert float(nope.std() / rope.std()) == pytest.approx(wanted, rel=0.25)
    assert float(query.nope.std() / rope.std()) == pytest.approx(wanted, rel=0.25)
