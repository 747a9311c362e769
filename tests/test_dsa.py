"""Sparse attention by an indexer: what it reads, who learns from which loss, and that a choice is made once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from conf.schema import Refused
from models import fp8
from models.attention import dsa as scheme
from models.mode import Mode
from models.model import Losses, Model
from models.sequence import Whole
from parallel.recompute import Recompute, recompute
from tests.schemes import SIGMOID, Row, dsa, layer, mla, packed, tokens

SEQUENCE = packed([[1, 17, 9], [3, 12, 6]])

INDEXER = ("index_query", "index_key", "index_norm")


def model_of(*plans: Any, mode: Mode = "sparse") -> Model:
    model = Row(tuple(layer(plan, SIGMOID) for plan in plans)).model_in(torch.float64)
    for attention in model.attentions():
        attention.mode = mode
    return model


def losses_of(model: Model, sequence: Whole = SEQUENCE) -> Losses:
    ids = tokens(*sequence.position.shape)
    losses = model(ids, sequence, ids)
    assert isinstance(losses, Losses)
    return losses


def gradients(model: Model, objective: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of the indexers' parameters, and of all others; those without one are left out."""
    model.zero_grad()
    objective.backward()
    taken = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    of_indexer = {name: gradient for name, gradient in taken.items() if any(part in name for part in INDEXER)}
    return of_indexer, {name: gradient for name, gradient in taken.items() if name not in of_indexer}


def test_with_as_many_chosen_as_there_are_it_is_latent_attention() -> None:
    """Also in the form that gathers: top_k one below the number of entries, but not below any query's visible ones."""
    ours, theirs = model_of(dsa(top_k=17)), model_of(mla(query_latent=7))
    theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if k in theirs.state_dict()})
    ids = tokens(*SEQUENCE.position.shape)
    assert SEQUENCE.position.shape[1] > 17 == int(SEQUENCE.position.max()) + 1
    torch.testing.assert_close(ours(ids, SEQUENCE), theirs(ids, SEQUENCE), rtol=1e-9, atol=1e-9)
    ours_all, theirs_all = (gradients(m, losses_of(m).cross_entropy)[1] for m in (ours, theirs))
    assert ours_all.keys() == theirs_all.keys()
    for name, gradient in theirs_all.items():
        torch.testing.assert_close(ours_all[name], gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", ["dense", "warmup"])
def test_dense_modes_read_everything(mode: Mode) -> None:
    ours, theirs = model_of(dsa(top_k=2), mode=mode), model_of(mla(query_latent=7))
    theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if k in theirs.state_dict()})
    ids = tokens(*SEQUENCE.position.shape)
    torch.testing.assert_close(ours(ids, SEQUENCE), theirs(ids, SEQUENCE), rtol=1e-9, atol=1e-9)


def test_sparse_mode_reads_less() -> None:
    model, ids = model_of(dsa(top_k=2)), tokens(*SEQUENCE.position.shape)
    sparse = model(ids, SEQUENCE)
    for attention in model.attentions():
        attention.mode = "dense"
    assert not torch.allclose(sparse, model(ids, SEQUENCE))


@pytest.mark.parametrize("mode", ["warmup", "sparse"])
def test_each_loss_teaches_its_own(mode: Mode) -> None:
    """The language model's loss gives the indexer no gradient, the indexer's own gives none to anything else."""
    model = model_of(dsa(top_k=3), dsa(top_k=3, pairing="interleaved"), mode=mode)
    all_of_indexer = {name for name, _ in model.named_parameters() if any(part in name for part in INDEXER)}
    of_indexer, of_others = gradients(model, losses_of(model).cross_entropy)
    assert not of_indexer and of_others
    balance_free = model_of(dsa(top_k=3), dsa(top_k=3, pairing="interleaved"), mode=mode)
    for feedforward in balance_free.feedforwards():
        object.__setattr__(feedforward.config, "balance_loss", 0.0)
    of_indexer, of_others = gradients(balance_free, losses_of(balance_free).extra)
    assert of_indexer.keys() == all_of_indexer and not of_others


def test_dense_mode_leaves_the_indexer_alone() -> None:
    model = model_of(dsa(top_k=3), mode="dense")
    losses = losses_of(model)
    of_indexer, _ = gradients(model, losses.cross_entropy + losses.extra)
    assert not of_indexer and "kl" not in losses.reports[0]
    assert [slot.name for slot in model.attentions()[0].slots()] == ["latent"]


def test_a_warm_up_teaches_what_to_choose() -> None:
    """On the attention as it is, the indexer alone: it comes nearer, and what it would choose holds more of it."""
    model = model_of(dsa(top_k=4), mode="warmup")
    learner = torch.optim.Adam(
        [parameter for part in model.attentions()[0].selector() for parameter in part.parameters()], 0.02
    )
    course = []
    for _ in range(60):
        losses = losses_of(model)
        learner.zero_grad()
        losses.extra.backward()
        learner.step()
        course.append({name: float(value[0] / value[1]) for name, value in losses.reports[0].items() if name != "load"})
    assert course[-1]["kl"] < 0.5 * course[0]["kl"]
    assert course[-1]["recall"] > course[0]["recall"] + 0.03


@pytest.mark.parametrize("mode", ["warmup", "sparse"])
def test_the_loss_is_a_mean_over_queries_of_the_global_batch(mode: Mode) -> None:
    """Rows one by one, divided by the readers of both, add up to both together."""
    plan = {**dsa(top_k=3)}
    model = Row((layer(plan),)).model_in(torch.float64)
    model.attentions()[0].mode = mode
    ids, readers = tokens(*SEQUENCE.position.shape), {1: SEQUENCE.readers(1)}
    parts = []
    for row in range(2):
        here = slice(row, row + 1)
        part = Whole(SEQUENCE.position[here], SEQUENCE.document[here], counts=SEQUENCE.counts, readers=readers)
        parts.append(model(ids[here], part, ids[here]).extra)
    whole = model(ids, SEQUENCE, ids).extra
    torch.testing.assert_close(torch.stack(parts).sum(), whole, rtol=1e-12, atol=0)
    report = model(ids, SEQUENCE, ids).reports[0]
    torch.testing.assert_close(whole, 0.7 * report["kl"][0] / report["kl"][1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("what", ["full", "attention"])
def test_recompute_keeps_the_choice(what: Recompute, monkeypatch: pytest.MonkeyPatch) -> None:
    """A choice that comes out otherwise the second time changes no gradient, bit for bit."""
    model = model_of(dsa(top_k=3), dsa(top_k=2))
    kept = losses_of(model)
    expected = gradients(model, kept.cross_entropy + kept.extra)
    choose, calls = scheme.choose, []

    def unsteady(*arguments: Any) -> Tensor:
        calls.append(arguments)
        return choose(*arguments) * int(len(calls) <= 2)

    monkeypatch.setattr(scheme, "choose", unsteady)
    recompute(model, what)
    again = losses_of(model)
    ours = gradients(model, again.cross_entropy + again.extra)
    assert len(calls) == 4
    for mine, other in zip(ours, expected, strict=True):
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in other)


def test_fp8_vectors_come_back_near() -> None:
    x = torch.randn(5, 7, 12, dtype=torch.float64) * torch.logspace(-20, 20, 7)[:, None]
    x[0, 0] = 0
    x.requires_grad_()
    held, scale = fp8.rounded(x)
    assert torch.equal(held.to(torch.float8_e4m3fn).to(held.dtype), held)
    assert torch.equal(scale.float().to(scale.dtype), scale)
    back = held * scale
    assert ((back - x).abs() <= x.abs() * 2**-4 + x.abs().amax(-1, keepdim=True) / 448 * 2**-9).all()
    (gradient,) = torch.autograd.grad(back.sum(), x)
    torch.testing.assert_close(gradient, torch.ones_like(x))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        pytest.param({"query_latent": None}, "query_latent", id="no query latent"),
        pytest.param({"rope_dim": 8}, "indexer.head_dim", id="rotates more than an index head has"),
        pytest.param({"indexer": {"heads": 2, "head_dim": 6, "top_k": 0}}, "top_k", id="top-k over nothing"),
        pytest.param(
            {"indexer": {"heads": 2, "head_dim": 6, "top_k": 1, "kl_loss": -1.0}}, "kl_loss", id="a loss below zero"
        ),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(Refused, match=named):
        Model(Row((layer({**dsa(), **changes}),)).config())


@pytest.mark.parametrize(
    ("context", "kv_bytes", "selection"),
    [
        pytest.param(4_096, 1284 * 4096, 2 * 64 * 128 * 4096, id="4K"),
        pytest.param(1_048_576, 1284 * 2**20, 2**34, id="1M"),
    ],
)
def test_published_cost_of_one_layer(context: int, kv_bytes: int, selection: int) -> None:
    """DeepSeek-V3.2: 1152 bytes of latent and 132 of index key; 16,384 operations a key; 2,048 of 278,528 read."""
    sizes: dict[str, Any] = {
        "heads": 128,
        "latent": 512,
        "query_latent": 1536,
        "nope_dim": 128,
        "rope_dim": 64,
        "value_dim": 128,
    }
    indexer = scheme.Indexer(heads=64, head_dim=128, top_k=2048, format="fp8")
    with torch.device("meta"):
        layer = scheme.Config(**sizes, indexer=indexer).build(7168)
    assert sum(p.numel() for n, p in layer.named_parameters() if "index" in n) / 1e6 == pytest.approx(13.959, abs=5e-4)
    one = {"bf16": 2, "fp8": 1, "fp32": 4}
    declared = sum(one[p.format] * p.numbers * slot.entries(context) for slot in layer.slots() for p in slot.parts)
    assert declared == kv_bytes
    step = layer.flops(1, context)
    assert step.selection == selection
    assert step.scores == 278_528 * 2048
