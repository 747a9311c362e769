"""The gate on what heads have read, and rotation of a part of a head, against their equations, token by token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from conf import schema
from models import mechanism
from models.sequence import Whole
from tests.schemes import gqa, tied_kv
from tests.test_attention import EPS, WIDTH, build, run, unit
from tests.test_gemma import assert_same, half_turned

LENGTH = 9


def by_token(attention: Any, x: Tensor) -> Tensor:
    """Laguna's attention; x: [S, D]. The first `rope_dim` numbers of a head turn; what it reads is gated."""
    c, outs = attention.config, []

    def turned(head: Tensor, gain: Tensor, position: int) -> Tensor:
        head = unit(head) * gain
        first = half_turned(head[: c.rope_dim], position, 100.0, c.rope_dim // 2)
        return torch.cat((first, head[c.rope_dim :]))

    values = [(attention.value.weight @ a).view(c.kv_heads, -1) for a in x]
    projected = [(attention.key.weight @ a).view(c.kv_heads, -1) for a in x]
    keys = [[turned(k, attention.key_norm.gain, t) for k in ks] for t, ks in enumerate(projected)]
    for t, a in enumerate(x):
        first, heads = max(0, t - c.window + 1), []
        gates = (1 + (attention.gate.weight @ a).exp()).log().view(c.heads, -1)
        for h, u in enumerate((attention.query.weight @ a).view(c.heads, -1)):
            query, kv = turned(u, attention.query_norm.gain, t), h * c.kv_heads // c.heads
            scores = torch.stack([query @ keys[s][kv] for s in range(first, t + 1)]) / math.sqrt(c.head_dim)
            read = sum(w * values[first + i][kv] for i, w in enumerate(scores.softmax(0)))
            heads.append(gates[h] * read)
        outs.append(attention.output.weight @ torch.cat(heads))
    return torch.stack(outs)


@pytest.mark.parametrize("gate", ["head", "element"])
@pytest.mark.parametrize("rope_dim", [2, 4])
def test_gated_attention_is_its_equations(gate: str, rope_dim: int) -> None:
    plan = gqa(gate=gate, rope_dim=rope_dim, window=4, qk_norm=True, norm_eps=EPS, rope={"base": 100.0})
    attention, x = build(plan), torch.randn(LENGTH, WIDTH, dtype=torch.float64)
    assert_same(attention, run(attention, x[None], Whole.rows(1, LENGTH))[0], by_token(attention, x))


@pytest.mark.parametrize("plan", [pytest.param(gqa(), id="gqa"), pytest.param(tied_kv(), id="tied_kv")])
@pytest.mark.parametrize("gate", ["head", "element"])
def test_a_gate_that_reads_nothing_is_ln_2(plan: dict[str, Any], gate: str) -> None:
    """An untrained gate shrinks what is read to 0.69 of it."""
    gated, plain = build(plan | {"gate": gate}), build(plan)
    plain.load_state_dict({name: tensor for name, tensor in gated.state_dict().items() if name != "gate.weight"})
    with torch.no_grad():
        gated.gate.weight.zero_()
    x, sequence = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64), Whole.rows(2, LENGTH)
    torch.testing.assert_close(run(gated, x, sequence), math.log(2) * run(plain, x, sequence))


def test_the_softplus_is_not_computed_in_bfloat16() -> None:
    gate = build(gqa(gate="head")).gate.to(torch.bfloat16)
    x = torch.randn(2, LENGTH, WIDTH, dtype=torch.bfloat16)
    raised = F.linear(x, gate.weight).float()
    assert torch.equal(gate(x)[..., 0], (1 + raised.exp()).log().to(torch.bfloat16))


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        pytest.param(gqa(gate="token"), "gate", id="another gate"),
        pytest.param(gqa(rope_dim=0), "rope_dim", id="no number rotated"),
        pytest.param(gqa(rope_dim=3), r"rope_dim \(3\) must be even", id="an odd share"),
        pytest.param(gqa(rope_dim=8), "head_dim", id="more than a head"),
        pytest.param(gqa(rope_dim=4, rope=None), "needs a rope", id="a share of no rotation"),
    ],
)
def test_what_cannot_be_is_refused(plan: dict[str, Any], words: str) -> None:
    with pytest.raises(schema.Refused, match=words):
        mechanism.config_of("attention", plan, "model.layers[0].of[0].attention")
