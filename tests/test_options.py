"""Options that many schemes offer, against their equations: a sink in the softmax, a grouped way out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from conf.schema import Refused
from models import mechanism
from models.sequence import Whole
from tests import schemes
from tests.schemes import Plan
from tests.test_attention import WIDTH, build, run
from tests.test_gemma import assert_same, half_turned

LENGTH = 9


def sunk_by_token(attention: Any, x: Tensor) -> Tensor:
    """Windowed attention with a sink; x: [S, D]."""
    c, outs = attention.config, []
    keys = [(attention.key.weight @ a).view(c.kv_heads, -1) for a in x]
    values = [(attention.value.weight @ a).view(c.kv_heads, -1) for a in x]
    for t, a in enumerate(x):
        first, heads = max(0, t - c.window + 1), []
        for h, u in enumerate((attention.query.weight @ a).view(c.heads, -1)):
            query, kv = half_turned(u, t, 100.0, c.head_dim // 2), h * c.kv_heads // c.heads
            near = [half_turned(keys[s][kv], s, 100.0, c.head_dim // 2) for s in range(first, t + 1)]
            exps = (torch.stack(near) @ query / math.sqrt(c.head_dim)).exp()
            total = exps.sum() + attention.sink[h].exp()
            heads.append(sum(e / total * values[first + i][kv] for i, e in enumerate(exps)))
        outs.append(attention.output.weight @ torch.cat(heads))
    return torch.stack(outs)


def test_a_sink_is_its_equation() -> None:
    """The gradient of each head's logit among the others."""
    attention, x = build(schemes.gqa(window=4, sink=True, rope={"base": 100.0})), torch.randn(LENGTH, WIDTH).double()
    assert_same(attention, run(attention, x[None], Whole.rows(1, LENGTH))[0], sunk_by_token(attention, x))


SINKS = [
    pytest.param(schemes.gqa(), id="gqa"),
    pytest.param(schemes.tied_kv(keeps="value"), id="tied_kv"),
    pytest.param(schemes.mla(), id="mla"),
    pytest.param(schemes.gla(), id="gla"),
    pytest.param(schemes.dsa(), id="dsa"),
    pytest.param(schemes.gta(), id="gta"),
    pytest.param(schemes.tpa(), id="tpa"),
    pytest.param(schemes.cca(), id="cca"),
    pytest.param(schemes.per_head_latent(), id="per-head latent"),
]


@pytest.mark.parametrize("plan", SINKS)
def test_a_sink_takes_its_share_in_every_scheme(plan: Plan) -> None:
    """A low one nothing, a high one all."""
    with_sink, without = build({**plan, "sink": True}), build(plan)
    without.load_state_dict({name: t for name, t in with_sink.state_dict().items() if name != "sink"})
    x, sequence = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64), schemes.packed([[6, 3], [1, 5]])
    real = sequence.document >= 0

    def read(sink: float) -> Tensor:
        with torch.no_grad():
            with_sink.sink.fill_(sink)
            return run(with_sink, x, sequence)[real]

    with torch.no_grad():
        plain = run(without, x, sequence)[real]
    torch.testing.assert_close(read(-1e6), plain, rtol=1e-9, atol=1e-12)
    assert not read(1e6).any()
    assert not torch.allclose(read(0.0), plain, rtol=1e-3)


OFFERED = [
    pytest.param(schemes.gqa(bias=True), id="gqa"),
    pytest.param(schemes.mla(heads=4), id="mla"),
    pytest.param(schemes.gla(), id="gla"),
    pytest.param(schemes.gta(), id="gta"),
    pytest.param(schemes.tpa(heads=4), id="tpa"),
    pytest.param(schemes.cca(), id="cca"),
    pytest.param(schemes.per_head_latent(), id="per-head latent"),
]


@pytest.mark.parametrize("plan", OFFERED)
def test_a_bottleneck_as_wide_as_its_heads_is_no_bottleneck(plan: Plan) -> None:
    """Grouped, it can then be any one matrix W: each group passes its heads on, or its own columns of W at once."""
    plain = build(plan)
    x, sequence = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64), Whole.rows(2, LENGTH)
    expected, matrix = run(plain, x, sequence), plain.output.weight.detach()
    inputs = matrix.shape[1] // 2
    identities = torch.eye(inputs).double().expand(2, -1, -1)
    whole = torch.eye(WIDTH).double()
    for narrow, wide in (
        (identities, matrix),
        (torch.stack(matrix.split(inputs, 1)), torch.cat((whole, whole), 1)),
    ):
        grouped = build({**plan, "output": {"groups": 2, "rank": narrow.shape[1]}})
        weights = {name: t for name, t in plain.state_dict().items() if not name.startswith("output")}
        weights |= {"output.narrow.weight": narrow, "output.wide.weight": wide}
        if "bias" in plan:
            weights["output.wide.bias"] = plain.output.bias
        grouped.load_state_dict(weights)
        torch.testing.assert_close(run(grouped, x, sequence), expected, rtol=1e-10, atol=1e-10)
        matrices = 2.0 * narrow.numel() + 2.0 * wide.numel()
        assert grouped.flops(1, 1).total - plain.flops(1, 1).total == matrices - 2.0 * matrix.numel()


@pytest.mark.parametrize(
    ("output", "words"),
    [
        pytest.param({"groups": 3, "rank": 4}, "multiple of output.groups", id="heads over groups"),
        pytest.param({"groups": 2, "rank": 0}, "must be positive", id="no rank"),
        pytest.param({"groups": 2}, "rank is missing", id="a rank left out"),
    ],
)
@pytest.mark.parametrize("plan", [schemes.gqa(), schemes.swa()], ids=["gqa", "swa"])
def test_a_grouping_that_cannot_be_is_refused(plan: Plan, output: dict[str, int], words: str) -> None:
    with pytest.raises(Refused, match=words):
        mechanism.config_of("attention", {**plan, "output": output}, "row")
