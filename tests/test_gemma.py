"""Gemma 4's mechanisms against their equations, written token by token; where an untrained model starts; refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from conf.schema import Refused
from models import mechanism
from models.injection.ple import GAIN
from models.model import Model
from models.sequence import Whole
from tests.schemes import DENSE, PARALLEL, PLE, Plan, Row, gqa, layer, tied_kv, tokens
from tests.test_attention import EPS, WIDTH, run, unit
from tests.test_attention import build as attention_of

LENGTH = 9


def half_turned(x: Tensor, position: int, base: float, live: int) -> Tensor:
    """Pair (i, i + d/2) by position · base^(−2i/d), the first `live` pairs."""
    y, half = x.clone(), len(x) // 2
    for i in range(live):
        angle = position * base ** (-2 * i / len(x))
        y[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        y[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return y


def by_token(attention: Any, x: Tensor, live: int) -> Tensor:
    """Values û, keys RoPE(û ⊙ gain), scores times the scale; x: [S, D]."""
    c, outs = attention.config, []
    values = [[unit(u) for u in (attention.key.weight @ a).view(c.kv_heads, -1)] for a in x]
    keys = [[half_turned(v * attention.key_norm.gain, t, 100.0, live) for v in vs] for t, vs in enumerate(values)]
    for t, a in enumerate(x):
        first = 0 if c.window is None else max(0, t - c.window + 1)
        heads = []
        for h, u in enumerate((attention.query.weight @ a).view(c.heads, -1)):
            query, kv = half_turned(unit(u) * attention.query_norm.gain, t, 100.0, live), h * c.kv_heads // c.heads
            weights = torch.stack([query @ keys[s][kv] * c.scale for s in range(first, t + 1)]).softmax(0)
            heads.append(sum(w * values[first + i][kv] for i, w in enumerate(weights)))
        outs.append(attention.output.weight @ torch.cat(heads))
    return torch.stack(outs)


@pytest.mark.parametrize("keeps", ["both", "value"])
@pytest.mark.parametrize("window", [None, 4])
def test_tied_kv_is_its_equations(keeps: str, window: int | None) -> None:
    plan = tied_kv(keeps=keeps, window=window, scale=0.7, norm_eps=EPS, rope={"base": 100.0, "proportion": 0.7})
    attention, x = attention_of(plan), torch.randn(LENGTH, WIDTH, dtype=torch.float64)
    assert_same(attention, run(attention, x[None], Whole.rows(1, LENGTH))[0], by_token(attention, x, live=2))


def assert_same(module: torch.nn.Module, ours: Tensor, theirs: Tensor, tolerance: float = 1e-10) -> None:
    """Outputs, and the gradients of all parameters."""
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    seed = torch.randn_like(theirs)
    gradients, expectations = (
        torch.autograd.grad((y * seed).sum(), list(module.parameters()), materialize_grads=True) for y in (ours, theirs)
    )
    for (name, _), gradient, expected in zip(module.named_parameters(), gradients, expectations, strict=True):
        assert torch.allclose(gradient, expected, rtol=1e-9, atol=1e-9), name


def feedforward_of(folder: str, plan: Plan, *sizes: int) -> Any:
    module = mechanism.config_of(folder, plan, "row").build(*sizes).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.3, 0.5)
    return module


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def test_per_layer_embedding_is_its_equation() -> None:
    ple = feedforward_of("injection", {**PLE, "norm_eps": EPS}, WIDTH, 23)
    gain = torch.randn(5, dtype=torch.float64)
    ids, embedded, x = tokens(1, LENGTH), *torch.randn(2, 1, LENGTH, WIDTH, dtype=torch.float64)
    ours = ple(x[None], Whole.rows(1, LENGTH), {"ids": ids, "embedding": embedded[None], GAIN: gain}).y[0]
    rows = []
    for token, e, a in zip(ids[0], embedded[0], x[0], strict=True):
        context = unit(ple.context.weight @ e / math.sqrt(WIDTH)) * gain
        said = (math.sqrt(5) * ple.table[token] + context) / math.sqrt(2)
        rows.append(ple.output.weight @ (gelu(ple.gate.weight @ a) * said))
    assert_same(ple, ours[0], torch.stack(rows))


def test_experts_beside_a_dense_feedforward_are_their_equation() -> None:
    parallel = feedforward_of("feedforward", {**PARALLEL, "norm_eps": EPS}, WIDTH)
    x = torch.randn(LENGTH, WIDTH, dtype=torch.float64)
    ours = parallel(x[None], Whole.rows(1, LENGTH), {}).y[0]

    def geglu(gate: Tensor, up: Tensor, down: Tensor, a: Tensor) -> Tensor:
        return down @ (gelu(gate @ a) * (up @ a))

    rows = []
    for a in x:
        shared = (parallel.shared.gate.weight, parallel.shared.up.weight, parallel.shared.down.weight)
        dense = geglu(*shared, unit(a) * parallel.dense_norm.gain)
        routed = parallel.router.logits.weight @ (unit(a) * parallel.router_scale / math.sqrt(WIDTH))
        # of all experts first, then those chosen, to one
        best, chosen = routed.softmax(0).topk(2)
        mixed = torch.zeros(WIDTH, dtype=torch.float64)
        for weight, e in zip(best / best.sum(), chosen, strict=True):
            gate, up = parallel.experts.gate_up[e].chunk(2)
            out = geglu(gate, up, parallel.experts.down[e], unit(a) * parallel.expert_norm.gain)
            mixed = mixed + weight * parallel.expert_scale[e] * out
        normed = unit(dense) * parallel.dense_post_norm.gain, unit(mixed) * parallel.expert_post_norm.gain
        rows.append(normed[0] + normed[1])
    assert_same(parallel, ours, torch.stack(rows))


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(gqa(heads=2, kv_heads=1, head_dim=256, qk_norm=True, scale=1.0), id="gqa"),
        pytest.param(tied_kv(heads=2, kv_heads=1, head_dim=256), id="tied_kv"),
        pytest.param(tied_kv(heads=2, kv_heads=1, head_dim=256, keeps="value"), id="tied_kv values"),
        pytest.param(gqa(heads=2, kv_heads=1, head_dim=256, qk_norm=True), id="the usual scale"),
    ],
)
def test_an_untrained_softmax_is_not_saturated(plan: Plan) -> None:
    """Scores of deviation one, whatever the scale; with gains of one, Gemma's would have √256 = 16."""
    model = Model(Row((layer(plan),)).config())
    model.initialise(0)
    attention: Any = model.attentions()[0]
    sequence = Whole.rows(1, 256)
    query, state = attention.compress(torch.randn(1, 256, WIDTH), sequence)
    key, _ = attention.keys_values(state["kv"])
    deviation = (torch.einsum("bshd,btkd->bhst", query.heads, key) * attention.scale).std()
    assert 0.5 < deviation < 2


def test_layers_may_go_without_what_others_are_injected() -> None:
    """The gain is shared by the depths that read it, and carried no further than the last of them."""
    model = Row((layer(gqa(), injection=PLE), layer(gqa()), layer(gqa(), injection=PLE), layer(gqa()))).model_in(
        torch.float64
    )
    stream, carried = model.enter(tokens(1, LENGTH), Whole.rows(1, LENGTH)), []
    for depth, block in enumerate(model.blocks):
        stream, _ = block(stream, Whole.rows(1, LENGTH).at(depth))
        carried.append(set(stream.carried))
    assert carried == [{"ids", "embedding", GAIN}] * 2 + [set()] * 2
    assert [name for name, _ in model.named_parameters() if "preambles" in name] == ["preambles.0.gain"]


def test_the_table_of_a_depth_is_its_own() -> None:
    """What a token adds at one depth moves no other's row, nor another token's."""
    model = Row((layer(gqa(), injection=PLE), layer(gqa(), injection=PLE))).model_in(torch.float64)
    ids = torch.tensor([[3, 5, 3]])
    F.mse_loss(model(ids, Whole.rows(1, 3)), torch.zeros(1, 3, 23, dtype=torch.float64)).backward()
    for block in model.blocks:
        table: Any = block.get_parameter("injection.feedforward.table")
        assert table.grad.norm(dim=1).nonzero().flatten().tolist() == [3, 5]


@pytest.mark.parametrize(
    ("layers", "model", "sentence"),
    [
        pytest.param((layer(tied_kv(qk_norm=False)),), {}, "one norm makes the key and the value", id="no norm"),
        pytest.param((layer(gqa(scale=0.0)),), {}, "scale", id="no scale"),
        pytest.param((layer(gqa(), {**PARALLEL, "shared_hidden": 0}),), {}, "dense feed-forward", id="no dense"),
        pytest.param(
            (layer(gqa(), {**DENSE, "activation": "relu"}),), {}, "activation is .relu", id="unknown activation"
        ),
        pytest.param((layer(gqa(), injection={**PLE, "hidden": 0}),), {}, "hidden", id="an injection of nothing"),
        pytest.param(
            (layer(gqa(), injection=PLE), layer(gqa(), injection={**PLE, "hidden": 6})), {}, "same settings", id="sizes"
        ),
        pytest.param((layer(gqa()),), {"logit_cap": 0.0}, "logit_cap", id="a cap of nothing"),
        pytest.param((layer(tied_kv()), layer(tied_kv(keeps="value"), reads=0)), {}, "layer 1 reads", id="other parts"),
    ],
)
def test_what_cannot_be_is_refused(layers: tuple[Plan, ...], model: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        Model(Row(layers, model).config())
