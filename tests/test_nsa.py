"""Native sparse attention against the paper's equations, token by token; what it reads and holds at its sizes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from conf import schema
from models import cost, mechanism
from models.contract import visible_pairs
from models.cores import gathered
from models.selection import index as indexing
from models.sequence import Whole
from tests import schemes
from tests.schemes import Row, layer
from tests.test_attention import WIDTH, build, run

LENGTH = 21


def shared_out(weights: list[float], block: int, stride: int, size: int, j: int) -> float:
    """Equation 9: of selection block j, over its strides m and the n entries that cover each."""
    total = 0.0
    for m in range(size // stride):
        for n in range(block // stride):
            i = size // stride * j + m - n
            total += weights[i] if 0 <= i < len(weights) else 0.0
    return total


def chosen_blocks(c: Any, t: int, scores: list[float]) -> list[int]:
    """The initial and the local ones, and the best of the others."""
    s, own = c.selection, t // c.selection.size
    always = {j for j in range(own + 1) if j < s.initial or j > own - s.local}
    others = sorted(set(range(own + 1)) - always, key=lambda j: (-scores[j], j))
    return sorted(always | set(others[: s.top_k - len(always)]))


def by_token(attention: Any, x: Tensor) -> tuple[Tensor, list[list[list[int]]]]:
    """Three softmaxes under gates, x: [S, D]; and the blocks that each KV head reads at each token."""
    c, length = attention.config, len(x)

    def heads(linear: Any, size: int) -> Tensor:
        return linear(x).view(length, -1, size)

    def turned(rows: Tensor, positions: list[int]) -> Tensor:
        return c.rope.rotate(rows[None], torch.tensor(positions)[None])[0]

    def made(mlp: Any, rows: Tensor) -> Tensor:
        flat = torch.cat([row + place for row, place in zip(rows, mlp.position, strict=True)])
        return mlp.down.weight @ F.silu(mlp.up.weight @ flat)

    everywhere = list(range(length))
    query = turned(heads(attention.query, c.head_dim), everywhere)
    gate = heads(attention.gate, 3).sigmoid()
    key = {name: heads(linear, c.head_dim) for name, linear in attention.key.items()}
    value = {name: heads(linear, c.values) for name, linear in attention.value.items()}
    starts = list(range(0, length - c.block + 1, c.stride))
    key |= {name: turned(key[name], everywhere) for name in ("selected", "window")}
    for held, mlp in ((key, attention.block_key), (value, attention.block_value)):
        rows = [
            torch.stack([made(mlp, held["compressed"][i : i + c.block, k]) for k in range(c.kv_heads)]) for i in starts
        ]
        held["compressed"] = torch.stack(rows) if rows else held["compressed"][:0]
    key["compressed"] = turned(key["compressed"], starts) if starts else key["compressed"]
    group, outs = c.heads // c.kv_heads, []
    choices: list[list[list[int]]] = []
    for t in range(length):
        there = [i for i, start in enumerate(starts) if start + c.block - 1 <= t]
        weights = [
            (key["compressed"][there, h // group] @ query[t, h] / math.sqrt(c.head_dim)).softmax(0).tolist()
            for h in range(c.heads)
        ]
        choices.append([])
        for k in range(c.kv_heads):
            scores = [
                sum(
                    shared_out(weights[h], c.block, c.stride, c.selection.size, j)
                    for h in range(k * group, (k + 1) * group)
                )
                for j in range(t // c.selection.size + 1)
            ]
            choices[t].append(chosen_blocks(c, t, scores))
        by_head = []
        for h in range(c.heads):
            k = h // group
            picked = [s for s in range(t + 1) if s // c.selection.size in choices[t][k]]
            near = list(range(max(0, t - c.window + 1), t + 1))
            out = torch.zeros(c.values, dtype=x.dtype)
            for b, (name, places) in enumerate((("compressed", there), ("selected", picked), ("window", near))):
                weight = (key[name][places, k] @ query[t, h] / math.sqrt(c.head_dim)).softmax(0)
                out = out + gate[t, h, b] * (weight @ value[name][places, k])
            by_head.append(out)
        outs.append(attention.output.weight @ torch.cat(by_head))
    return torch.stack(outs), choices


@pytest.mark.parametrize("tile", [pytest.param(2**26, id="one tile"), pytest.param(1, id="query by query")])
@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(schemes.nsa(), id="blocks of 4 every 2"),
        pytest.param(schemes.nsa(size=6, top_k=2, block=6, stride=2, kv_heads=4), id="each entry in two blocks"),
        pytest.param(schemes.nsa(size=2, top_k=5, local=2, block=2, stride=2, kv_heads=1), id="without overlap"),
        pytest.param(schemes.nsa(size=3, top_k=2, initial=0, block=3, stride=1, window=1), id="every token"),
        pytest.param(schemes.nsa(size=4, top_k=3, initial=2, block=2, stride=1), id="nothing left to choose"),
        pytest.param(schemes.nsa(top_k=300, value_dim=None), id="all chosen"),
        pytest.param(schemes.nsa(size=40, top_k=2, block=40, stride=20), id="no block is complete"),
    ],
)
def test_nsa_is_its_equations(plan: schemes.Plan, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (gathered, indexing):
        monkeypatch.setattr(module, "TILE_NUMBERS", tile)
    attention, x = build(plan), torch.randn(LENGTH, WIDTH, dtype=torch.float64)
    ours, (theirs, _) = run(attention, x[None], Whole.rows(1, LENGTH))[0], by_token(attention, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    seed = torch.randn_like(theirs)
    names, parameters = zip(*attention.named_parameters(), strict=True)
    gradients, expectations = (
        torch.autograd.grad((y * seed).sum(), parameters, materialize_grads=True) for y in (ours, theirs)
    )
    for name, gradient, expected in zip(names, gradients, expectations, strict=True):
        assert torch.allclose(gradient, expected, rtol=1e-9, atol=1e-9), name


def test_kv_heads_choose_for_themselves() -> None:
    """And which blocks matters: other ones are read at the same token."""
    attention, x = build(schemes.nsa()), torch.randn(LENGTH, WIDTH, dtype=torch.float64)
    _, choices = by_token(attention, x)
    assert any(first != second for first, second in choices)
    assert len({tuple(first) for first, _ in choices[16:20]}) > 1


def test_the_paper_s_shape_reads_and_holds_what_it_says() -> None:
    """Table 4: 11.6 times fewer tokens read at 65,536 and 4 times fewer at 8,192; an entry more for each 16 tokens."""
    sizes = {"heads": 64, "kv_heads": 4, "head_dim": 192, "value_dim": 128, "hidden": 192}
    plan = {"scheme": "nsa", **sizes}
    model = cost.meta(Row((layer(plan),)).config())
    compressed, selected, window, _ = Row((layer(plan),)).slots
    read = {n: [visible_pairs(slot, 1, n) for slot in (compressed, selected, window)] for n in (8192, 65536)}
    assert read[65536] == [4095, 1024, 512]
    assert 65536 / sum(read[65536]) == pytest.approx(11.6, abs=0.05)
    assert 8192 / sum(read[8192]) == pytest.approx(4.0, abs=0.05)
    assert cost.kv_bytes_per_token(model) == 2720
    held = cost.kv_bytes(model, 8192)
    entry = 4 * (192 + 128) * 2
    assert held == {
        "entries": (8192 + 511) * entry,
        "windows": 512 * entry,
        "tails": 31 * entry,
        "total": (8192 + 511 + 512 + 31) * entry,
    }


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        pytest.param(schemes.nsa(heads=5), "multiple of kv_heads", id="heads over kv_heads"),
        pytest.param(schemes.nsa(head_dim=5), "even", id="odd head_dim"),
        pytest.param(schemes.nsa(hidden=0), "positive", id="no hidden"),
        pytest.param(schemes.nsa(stride=3), "divide", id="a stride between blocks"),
        pytest.param(schemes.nsa(stride=0), "positive", id="no stride"),
        pytest.param(schemes.nsa(size=2), "selection.size", id="entries longer than what they choose"),
        pytest.param(schemes.nsa(block=1, stride=1), "block", id="a block of one token"),
        pytest.param(schemes.nsa(top_k=1), "top_k", id="no room for what is always chosen"),
        pytest.param(schemes.nsa(local=0), "local", id="not even its own block"),
        pytest.param(schemes.nsa(window=0), "window", id="a window of nothing"),
    ],
)
def test_an_impossible_layer_is_refused(plan: schemes.Plan, words: str) -> None:
    with pytest.raises(schema.Refused, match=words):
        mechanism.config_of("attention", plan, "model.layers[0].of[0].attention")
