"""A window, the first tokens and strided anchors against one softmax over just those tokens; what the cache holds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from conf import schema
from models import cost, mechanism
from models.cache import Cache
from models.cores import gathered
from models.decode import advance
from models.sequence import Whole
from tests import schemes
from tests.schemes import Row, layer, tokens
from tests.test_attention import WIDTH, build, run

LENGTH = 19


def read_tokens(t: int, window: int, first: int, stride: int | None) -> list[int]:
    """By the words of the scheme: each token once, whatever it is read as."""
    last_of_stride = set() if stride is None else {first + i * stride - 1 for i in range(1, LENGTH)}
    return [s for s in range(t + 1) if t - s < window or s < first or s in last_of_stride]


def by_token(attention: Any, x: Tensor) -> Tensor:
    """Grouped-query attention with the read tokens alone in each softmax; x: [S, D]."""
    c, position = attention.config, torch.arange(len(x))[None]
    query, key = (
        c.rope.rotate((linear(x)).view(1, len(x), -1, c.head_dim), position)[0]
        for linear in (attention.query, attention.key)
    )
    value = attention.value(x).view(len(x), -1, c.head_dim)
    outs = []
    for t in range(len(x)):
        near = read_tokens(t, c.window, c.first, c.stride)
        heads = []
        for h in range(c.heads):
            k = h // (c.heads // c.kv_heads)
            weights = (key[near, k] @ query[t, h] / math.sqrt(c.head_dim)).softmax(0)
            heads.append(weights @ value[near, k])
        outs.append(attention.output.weight @ torch.cat(heads))
    return torch.stack(outs)


@pytest.mark.parametrize("tile", [pytest.param(2**26, id="one tile"), pytest.param(1, id="query by query")])
@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(schemes.anchors(), id="all three"),
        pytest.param(schemes.anchors(window=1, first=6, stride=2), id="few near, many first"),
        pytest.param(schemes.anchors(window=3, first=0, stride=4, kv_heads=1), id="strides alone"),
        pytest.param(schemes.anchors(window=3, first=4, stride=None, kv_heads=4), id="first alone"),
        pytest.param(schemes.anchors(window=40, first=50, stride=60), id="longer than the document"),
    ],
)
def test_anchors_are_one_softmax_over_their_tokens(
    plan: schemes.Plan, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathered, "TILE_NUMBERS", tile)
    attention, x = build(plan), torch.randn(LENGTH, WIDTH, dtype=torch.float64)
    ours, theirs = run(attention, x[None], Whole.rows(1, LENGTH))[0], by_token(attention, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    seed = torch.randn_like(theirs)
    names, parameters = zip(*attention.named_parameters(), strict=True)
    gradients, expectations = (torch.autograd.grad((y * seed).sum(), parameters) for y in (ours, theirs))
    for name, gradient, expected in zip(names, gradients, expectations, strict=True):
        assert torch.allclose(gradient, expected, rtol=1e-9, atol=1e-9), name


@pytest.mark.parametrize(("length", "held"), [(1, [1, 1, 0]), (4, [4, 2, 0]), (6, [5, 2, 1]), (47, [5, 2, 11])])
def test_the_cache_holds_window_first_and_strides(length: int, held: list[int]) -> None:
    """5 + 2 + (T − 2) / 4 entries of 2 · 2 · 6 numbers, and not one more."""
    model = Row((layer(schemes.anchors(stride=4)),)).model_in(torch.float32, torch.bfloat16)
    cache = Cache(model, 1, length)
    advance(model, cache, tokens(1, length))
    assert [int((store.position >= 0).sum()) for store in cache.stores.values()] == held
    assert sum(cache.num_bytes().values()) == sum(held) * 2 * 2 * 6 * 2


def test_anchors_are_counted_as_they_are_kept_and_read() -> None:
    """Strides alone grow the cache: 24 numbers for each 4 tokens, where an unbounded window takes them for each."""
    model = cost.meta(Row((layer(schemes.anchors(stride=4)),)).config())
    assert cost.kv_bytes_per_token(model) == 24 * 2 / 4
    assert cost.kv_bytes_per_token(model, naive=True) == 24 * 2
    assert cost.read_bytes_per_step(model, 1000) == (5 + 2 + (1000 - 5 - 2) // 4) * 24 * 2


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        pytest.param(schemes.anchors(window=None), "window must be given", id="no window"),
        pytest.param(schemes.anchors(first=-1), "first", id="fewer than none"),
        pytest.param(schemes.anchors(stride=1), "stride", id="every token"),
        pytest.param(schemes.anchors(first=0, stride=None), "gqa", id="no anchor"),
    ],
)
def test_impossible_anchors_are_refused(plan: schemes.Plan, words: str) -> None:
    with pytest.raises(schema.Refused, match=words):
        mechanism.config_of("attention", plan, "model.layers[0].of[0].attention")
