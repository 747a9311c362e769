"""Mixture of experts: routing against references typed here, dispatch and grouped GEMM against their obvious twins."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from conf import schema
from models import activation
from models.contract import NOTHING
from models.feedforward import moe
from models.model import Model
from models.moe import balance, dispatch, experts, hashed, router
from models.sequence import Whole
from tests import schemes
from tests.schemes import packed


def build(width: int = 8, dtype: torch.dtype = torch.float64, **keys: Any) -> Any:
    """A layer with every parameter and the selection bias random."""
    keys = {"experts": 6, "top_k": 2, "hidden": 8, **keys}
    layer = schema.build(moe.Config, keys, "moe").build(width).to(dtype)
    with torch.no_grad():
        for tensor in filter(torch.is_floating_point, [*layer.parameters(), *layer.buffers()]):
            tensor.normal_(0, 0.5)
    return layer


def select(scores: list[float], k: int, groups: int = 1, kept: int = 1) -> list[int]:
    """The k best, ties to the lowest index, within the groups whose two best sum highest."""
    size = len(scores) // groups
    of_group = [sum(sorted(scores[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
    allowed = sorted(range(groups), key=lambda g: (-of_group[g], g))[:kept]
    candidates = [e for e in range(len(scores)) if e // size in allowed]
    return sorted(candidates, key=lambda e: (-scores[e], e))[:k]


ROUTERS = [
    pytest.param({}, id="softmax"),
    pytest.param({"normalise": False, "scaling": 1.5}, id="softmax unnormalised"),
    pytest.param({"affinity": "sigmoid"}, id="sigmoid"),
    pytest.param({"affinity": "sigmoid", "bias": True, "scaling": 2.5}, id="sigmoid bias"),
    pytest.param({"affinity": "sigmoid", "bias": True, "groups": 3, "kept_groups": 2}, id="sigmoid bias groups"),
    pytest.param({"affinity": "sqrt_softplus", "bias": True, "scaling": 1.5}, id="sqrt softplus bias"),
    pytest.param({"groups": 6, "kept_groups": 4, "bias": True}, id="groups of one"),
]


@pytest.mark.parametrize("keys", ROUTERS)
def test_router_is_its_reference(keys: dict[str, Any]) -> None:
    layer = build(router=keys, top_k=3)
    x = torch.randn(40, 8, dtype=torch.float64)
    routing = layer.router(x)
    for n, token in enumerate(x):
        logits = [float(row @ token) for row in layer.router.logits.weight.detach()]
        if keys.get("affinity") == "sigmoid":
            affinity = [1 / (1 + math.exp(-logit)) for logit in logits]
        elif keys.get("affinity") == "sqrt_softplus":
            affinity = [math.sqrt(math.log(1 + math.exp(logit))) for logit in logits]
        else:
            affinity = [math.exp(logit) / sum(math.exp(other) for other in logits) for logit in logits]
        bias = layer.router.bias.tolist() if keys.get("bias") else [0.0] * 6
        scores = [a + b for a, b in zip(affinity, bias, strict=True)]
        chosen = select(scores, 3, keys.get("groups", 1), keys.get("kept_groups", 1))
        assert routing.experts[n].tolist() == chosen
        weights = [affinity[e] for e in chosen]
        total = sum(weights) if keys.get("normalise", True) else 1.0
        expected = [keys.get("scaling", 1.0) * weight / total for weight in weights]
        assert routing.weights[n].tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_root_of_the_softplus_has_a_gradient_everywhere(dtype: torch.dtype) -> None:
    """Below −104, softplus is 0 in float32, and the root's derivative there is not a number."""
    logits = torch.tensor([-150.0, -104.0, -60.0, -40.5, -39.5, -3.0, 0.0, 30.0], dtype=dtype, requires_grad=True)
    affinity = router.sqrt_softplus(logits)
    (slope,) = torch.autograd.grad(affinity.sum(), logits)
    for x, y, dy in zip(logits.tolist(), affinity.tolist(), slope.tolist(), strict=True):
        root = math.sqrt(math.log1p(math.exp(x)))
        assert y == pytest.approx(root, rel=1e-5)
        assert dy == pytest.approx(1 / (1 + math.exp(-x)) / (2 * root), rel=1e-5)


@pytest.mark.parametrize(("vocab", "experts", "top_k"), [(23, 5, 2), (1000, 16, 6), (7, 4, 4), (3, 9, 1), (50, 6, 3)])
def test_a_table_starts_balanced(vocab: int, experts: int, top_k: int) -> None:
    """Different experts for each token, loads that differ by one at most; another seed gives another table."""
    tables = []
    for seed in (0, 0, 1):
        table = hashed.Table(vocab, experts, top_k)
        table.start_buffers(torch.Generator().manual_seed(seed))
        tables.append(table.experts)
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])
    assert all(len(set(row)) == top_k for row in tables[0].tolist())
    load = tables[0].flatten().bincount(minlength=experts)
    assert load.max() - load.min() <= 1


def test_a_table_chooses_and_the_affinity_weighs() -> None:
    layer = build(router={"affinity": "sqrt_softplus", "hash_vocab": 11, "scaling": 1.5}, balance_loss=0.3)
    layer.router.table.start_buffers(torch.Generator().manual_seed(0))
    x, ids = torch.randn(2, 5, 8, dtype=torch.float64), torch.tensor([[0, 3, 10, 3, 7], [1, 1, 1, 2, 9]])
    routing = layer.router(x.flatten(0, 1), ids.flatten())
    assert torch.equal(routing.experts, layer.router.table.experts[ids.flatten()])
    for n, token in enumerate(x.flatten(0, 1)):
        affinity = [
            math.sqrt(math.log(1 + math.exp(float((row @ token).detach())))) for row in layer.router.logits.weight
        ]
        chosen = [affinity[e] for e in routing.experts[n]]
        assert routing.weights[n].tolist() == pytest.approx([1.5 * a / sum(chosen) for a in chosen], rel=1e-12)
    assert layer.needs == ("ids",)
    result = layer(x, Whole.rows(2, 5), {"ids": ids})
    assert result.extra is None, "no loss can move a table"
    assert result.report["load"].tolist() == routing.experts.flatten().bincount(minlength=6).tolist()
    layer.update_bias(result.report["load"])


def test_a_table_must_know_the_vocabulary() -> None:
    row = schemes.Row((schemes.layer(schemes.gqa(), schemes.HASHED),), {"vocab": 24})
    with pytest.raises(schema.Refused, match=r"23 token ids, but model\.vocab is 24"):
        Model(row.config())


@pytest.mark.parametrize("shared_hidden", [0, 5])
def test_a_clamp_bounds_what_enters_the_product(shared_hidden: int) -> None:
    """The gate from above alone, the other from both sides; in routed and shared experts alike."""
    layer = build(shared_hidden=shared_hidden, clamp=0.1)
    x = torch.randn(1, 6, 8, dtype=torch.float64)

    def expert(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(gate.minimum(torch.tensor(0.1))) * up.maximum(torch.tensor(-0.1)).minimum(
            torch.tensor(0.1)
        )

    routing, rows = layer.router(x[0]), []
    for n, token in enumerate(x[0]):
        out = torch.zeros(8, dtype=torch.float64)
        for e, weight in zip(routing.experts[n], routing.weights[n], strict=True):
            out += weight * (layer.experts.down[e] @ expert(*(layer.experts.gate_up[e] @ token).chunk(2)))
        if layer.shared is not None:
            out += layer.shared.down(expert(layer.shared.gate(token), layer.shared.up(token)))
        rows.append(out)
    torch.testing.assert_close(layer(x, Whole.rows(1, 6), {}).y[0], torch.stack(rows))
    clamped = activation.gating("silu", 10.0)
    assert clamped(torch.tensor(-50.0), torch.tensor(1.0)) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("keys", [{}, {"groups": 3, "kept_groups": 2}, {"affinity": "sigmoid", "bias": True}])
def test_ties_go_to_the_lowest_index(keys: dict[str, Any]) -> None:
    """Many equal logits, in a batch long enough for an unstable sort to shuffle them."""
    layer = build(router=keys, experts=12, top_k=5)
    with torch.no_grad():
        layer.router.logits.weight.copy_(torch.tensor([[1.0], [0.0], [1.0]] * 4, dtype=torch.float64).expand(12, 8))
        if layer.router.bias is not None:
            layer.router.bias.zero_()
    chosen = layer.router(torch.ones(200, 8, dtype=torch.float64)).experts
    assert chosen.tolist() == [[0, 2, 3, 5, 6]] * 200


def test_a_router_bias_selects_and_does_not_weigh() -> None:
    layer = build(router={"affinity": "sigmoid", "bias": True}, top_k=6)
    x = torch.randn(20, 8, dtype=torch.float64)
    before = layer.router(x)
    layer.router.bias += torch.randn(6, dtype=torch.float64)
    after = layer.router(x)
    assert not torch.equal(before.experts, after.experts)
    order = before.experts.argsort(1), after.experts.argsort(1)
    torch.testing.assert_close(before.weights.gather(1, order[0]), after.weights.gather(1, order[1]))
    assert not any(name.endswith("bias") for name, _ in layer.named_parameters())
    assert "router.bias" in layer.state_dict()


LOADS = [
    pytest.param([3, 0, 5, 1], id="one without a token"),
    pytest.param([0, 9, 0, 0], id="all to one"),
    pytest.param([0, 0, 0, 9], id="all to the last"),
    pytest.param([2, 2, 2, 3], id="even"),
]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("load", LOADS)
def test_grouped_gemm_is_the_loop(load: list[int], dtype: torch.dtype, tolerance: float) -> None:
    x = torch.randn(9, 8, dtype=dtype, requires_grad=True)
    gate_up = torch.randn(4, 32, 8, dtype=dtype, requires_grad=True)
    down = torch.randn(4, 8, 16, dtype=dtype, requires_grad=True)
    ours, theirs = (form(x, torch.tensor(load), gate_up, down) for form in (experts.grouped, experts.loop))
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=10 * tolerance)
    weights = torch.randn_like(theirs)
    gradients = [
        torch.autograd.grad((y * weights).sum(), (x, gate_up, down), retain_graph=True) for y in (ours, theirs)
    ]
    for gradient, expected in zip(*gradients, strict=True):
        assert (gradient - expected).norm() <= tolerance * expected.norm()
    assert not gradients[0][2][torch.tensor(load) == 0].any()


@pytest.mark.parametrize(("width", "hidden"), [(8, 8), (8, 12), (12, 8), (5, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_size_of_expert_works(width: int, hidden: int, dtype: torch.dtype) -> None:
    """A grouped GEMM wants rows of 16 bytes; the sizes of a model need not be such."""
    layer = build(width, torch.float32, hidden=hidden)
    x = torch.randn(2, 7, width)
    exact = layer(x, Whole.rows(2, 7), {}).y
    y = layer(x.to(dtype), Whole.rows(2, 7), {}).y
    assert y.dtype == dtype
    assert (y - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(
    "chosen", [[[0, 3]] * 5, [[1, 0], [3, 2], [0, 1], [2, 1], [1, 3]], [[2], [2], [0]], [[1, 0, 3, 2]]]
)
def test_dispatch_is_indexing(chosen: list[list[int]]) -> None:
    """Out and back, forward and backward, against plain indexing with its scattered adds."""
    choice = torch.tensor(chosen)
    order = dispatch.by_expert(choice, 4)
    assert order.load.tolist() == [sum(row.count(e) for row in chosen) for e in range(4)]
    x = torch.randn(len(chosen), 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(choice.shape, dtype=torch.float64, requires_grad=True)
    rows = dispatch.spread(x, order)
    copies = [
        (n, j) for e in range(4) for n, row in enumerate(chosen) for j, chosen_e in enumerate(row) if chosen_e == e
    ]
    plain_rows = x[[n for n, _ in copies]]
    assert torch.equal(rows, plain_rows)
    out = dispatch.gather(rows.square(), weights, order)
    plain = torch.zeros_like(x).index_add(
        0,
        torch.tensor([n for n, _ in copies]),
        plain_rows.square() * weights[tuple(zip(*copies, strict=True))][:, None],
    )
    torch.testing.assert_close(out, plain)
    seed = torch.randn_like(x)
    for gradient, expected in zip(
        torch.autograd.grad((out * seed).sum(), (x, weights)),
        torch.autograd.grad((plain * seed).sum(), (x, weights)),
        strict=True,
    ):
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("favourite", [None, 0, 5], ids=["even", "first expert", "last expert"])
@pytest.mark.parametrize("shared_hidden", [0, 5])
def test_layer_is_a_sum_over_its_experts(shared_hidden: int, favourite: int | None) -> None:
    """Token by token; also where the bias sends every token to one expert, and leaves others without any."""
    layer = build(shared_hidden=shared_hidden, router={"affinity": "sigmoid", "bias": True})
    if favourite is not None:
        layer.router.bias[favourite] = 100.0
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    result = layer(x, Whole.rows(2, 5), {})
    assert result.extra is None
    routing = layer.router(x.flatten(0, 1))
    assert result.report["load"].tolist() == [int((routing.experts == e).sum()) for e in range(6)]
    if favourite is not None:
        assert result.report["load"][favourite] == 10
    rows = []
    for n, token in enumerate(x.flatten(0, 1)):
        out = torch.zeros(8, dtype=torch.float64) if layer.shared is None else layer.shared.glu(token)
        for e, weight in zip(routing.experts[n], routing.weights[n], strict=True):
            gate, up = (layer.experts.gate_up[e] @ token).chunk(2)
            out = out + weight * (layer.experts.down[e] @ (torch.nn.functional.silu(gate) * up))
        rows.append(out)
    expected = torch.stack(rows).view_as(x)
    torch.testing.assert_close(result.y, expected)
    leaves = (x, *layer.parameters())
    seed = torch.randn_like(x)
    for gradient, wanted in zip(
        torch.autograd.grad((result.y * seed).sum(), leaves),
        torch.autograd.grad((expected * seed).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(gradient, wanted)


def test_balance_loss_by_hand() -> None:
    """Two tokens of one row, E = 4, k = 2; then the same beside padding, and in a row of its own."""
    affinity = torch.tensor([[[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]]], dtype=torch.float64)
    chosen = torch.tensor([[[0, 1], [3, 1]]])
    # f = 4 / (2 · 2) · [1, 2, 0, 1], P = [0.25, 0.25, 0.25, 0.25]: Σ f P = 1
    assert float(balance.sequence_balance(affinity, chosen, Whole.rows(1, 2))) == pytest.approx(1.0)
    # twice the affinity is the same share; one token alone: f = 2 · [1, 1, 0, 0], P = its affinity
    alone = balance.sequence_balance(2 * affinity[:, :1], chosen[:, :1], Whole.rows(1, 1))
    assert float(alone) == pytest.approx(2 * 0.7)
    padded = packed([[1], [2]])
    both = torch.cat((affinity, affinity)), torch.cat((chosen, chosen))
    assert float(balance.sequence_balance(*both, padded)) == pytest.approx(2 * 0.7 + 1.0)
    assert float(balance.sequence_balance(*both, packed([[], [2]]))) == pytest.approx(1.0)


def test_balance_loss_moves_probability_not_frequency() -> None:
    affinity = torch.tensor([[[0.5, 0.25, 0.25]]], dtype=torch.float64, requires_grad=True)
    loss = balance.sequence_balance(affinity, torch.tensor([[[0]]]), Whole.rows(1, 1))
    (gradient,) = torch.autograd.grad(loss, affinity)
    # 3 · a₀ / Σa: derivative 3 · (1 − 0.5) for the chosen, −3 · 0.5 for the others
    assert gradient.flatten().tolist() == pytest.approx([1.5, -1.5, -1.5])


def test_router_z_loss_by_hand() -> None:
    logits = torch.tensor([[[0.0, 0.0], [math.log(3.0), 0.0], [9.0, 9.0]]], dtype=torch.float64)
    two_of_three = Whole(torch.tensor([[0, 1, 0]]), torch.tensor([[0, 0, NOTHING]]))
    expected = math.log(2.0) ** 2 + math.log(4.0) ** 2
    assert float(balance.router_z(logits, two_of_three)) == pytest.approx(expected)


def test_losses_are_divided_by_global_counts() -> None:
    layer = build(balance_loss=0.5, z_loss=0.25)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    counts = {"tokens": torch.tensor(40.0), "sequences": torch.tensor(8.0)}
    whole = Whole.rows(2, 5)
    extra = layer(x, Whole(whole.position, whole.document, counts=counts), {}).extra
    routing = layer.router(x.flatten(0, 1))
    evenness = balance.sequence_balance(routing.affinity.view(2, 5, 6), routing.experts.view(2, 5, 2), whole)
    z = balance.router_z(routing.logits.view(2, 5, 6), whole)
    torch.testing.assert_close(extra, 0.5 * evenness / 8 + 0.25 * z / 40)
    assert not layer(x, whole, {}).report["load"].requires_grad


@pytest.mark.parametrize(
    ("load", "step"),
    [
        ([4, 0, 2], [-1, 1, 0]),
        ([2, 2, 2], [0, 0, 0]),
        ([0, 0, 9], [1, 1, -1]),
        ([2**24 + 1, 2**24 + 3, 2**24 - 1], [0, -1, 1]),
    ],
)
def test_the_bias_steps_towards_the_mean_load(load: list[int], step: list[int]) -> None:
    bias = torch.tensor([0.5, -0.25, 0.0])
    moved = balance.bias_step(bias, torch.tensor(load), 0.125)
    assert moved.tolist() == [b + 0.125 * s for b, s in zip([0.5, -0.25, 0.0], step, strict=True)]
    layer = build(router={"bias": True}, experts=3, dtype=torch.float32, bias_rate=0.125)
    layer.router.bias.copy_(bias)
    layer.update_bias(torch.tensor(load))
    assert torch.equal(layer.router.bias, moved)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"top_k": 7}, "top_k"),
        ({"top_k": 0}, "top_k"),
        ({"hidden": 0}, "hidden"),
        ({"shared_hidden": -1}, "shared_hidden"),
        ({"router": {"groups": 4}}, "groups"),
        ({"router": {"groups": 0}}, "groups"),
        ({"router": {"groups": 3, "kept_groups": 4}}, "kept_groups"),
        ({"router": {"groups": 6, "kept_groups": 1}}, "kept groups"),
        ({"router": {"affinity": "tanh"}}, "affinity"),
        ({"router": {"hash_vocab": 9, "bias": True}}, "a table chooses"),
        ({"router": {"hash_vocab": 9, "groups": 3, "kept_groups": 2}}, "a table chooses"),
        ({"router": {"hash_vocab": 0}}, "hash_vocab"),
        ({"clamp": 0.0}, "clamp"),
    ],
)
def test_an_impossible_layer_is_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(schema.Refused, match=words):
        build(**keys)


def test_router_computes_in_float32_under_bfloat16() -> None:
    layer = build(dtype=torch.float32)
    x = torch.randn(64, 8).bfloat16()
    routing = layer.router(x)
    assert routing.weights.dtype == routing.logits.dtype == torch.float32
    torch.testing.assert_close(routing.logits, x.float() @ layer.router.logits.weight.T)
    assert isinstance(routing, router.Routing)
