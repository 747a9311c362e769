"""Multi-token prediction: equal to formulas written out token by token, blind to the next document, and not there when
the model generates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from conf.schema import Refused
from models import cost
from models.ahead import Ahead
from models.contract import NOTHING, all_pairs
from models.loss import IGNORE
from models.model import Losses, Model
from models.sequence import Whole
from parallel.recompute import recompute
from tests.schemes import DENSE, MHC, SIGMOID, SOFTMAX, VOCAB, Plan, Row, dsa, gqa, hca, layer, mla, packed, swa, tokens

DEPTHS = (1, 2)


def mtp(scheme: str, attention: Plan, depth: int, shared: bool = False, feedforward: Plan = DENSE) -> dict[str, Any]:
    return {"scheme": scheme, "depth": depth, "shared": shared, "layer": layer(attention, feedforward)}


ROWS = {
    "concat": (Row((layer(mla()),)), lambda depth: mtp("concat", mla(), depth)),
    "concat shared": (Row((layer(gqa()),), {"tied": True}), lambda depth: mtp("concat", gqa(), depth, shared=True)),
    "concat scaled": (
        Row((layer(gqa()),), {"embedding_scale": 4.0, "logit_cap": 3.0, "norm": "layer"}),
        lambda depth: mtp("concat", gqa(), depth),
    ),
    "concat on streams": (Row((layer(gqa()),), MHC), lambda depth: mtp("concat", gqa(), depth)),
    "streams affine": (
        Row((layer(gqa()),), {"residual": {"scheme": "affine"}}),
        lambda depth: mtp("streams", gqa(), depth),
    ),
    "streams": (Row((layer(hca()),), MHC), lambda depth: mtp("streams", swa(), depth)),
    "streams plain": (Row((layer(gqa()),)), lambda depth: mtp("streams", mla(), depth)),
}

every_row = pytest.mark.parametrize(
    ("row", "depth"),
    [pytest.param(name, depth, id=f"{name} {depth}") for name in ROWS for depth in DEPTHS],
)


def made(name: str, depth: int, dtype: torch.dtype = torch.float64) -> Model:
    row, further = ROWS[name]
    return row_with(row, further(depth)).model_in(dtype)


def row_with(row: Row, further: Mapping[str, Any]) -> Row:
    return Row(row.layers, {**row.model, "mtp": further})


def following(ids: Tensor, sequence: Whole, depth: int) -> tuple[Tensor, Ahead]:
    """Targets of the model, and what multi-token prediction is handed, by walking along each row."""
    rows, length = ids.shape
    after = torch.full((1 + depth, rows, length), IGNORE)
    for d in range(1 + depth):
        for b in range(rows):
            for i in range(length - 1 - d):
                if sequence.document[b, i] != NOTHING and sequence.document[b, i] == sequence.document[b, i + 1 + d]:
                    after[d, b, i] = ids[b, i + 1 + d]
    return after[0], Ahead(after[:depth], after[1:])


def losses_of(model: Model, ids: Tensor, sequence: Whole, depth: int) -> Losses:
    targets, ahead = following(ids, sequence, depth)
    losses = model(ids, sequence, targets, ahead=ahead)
    assert isinstance(losses, Losses)
    return losses


def gradients(model: Model, objective: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    objective.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def rms(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean() + eps).sqrt() * gain


def normed(norm: Any, x: Tensor) -> Tensor:
    """The norm of one vector."""
    if hasattr(norm, "bias"):
        centred = x - x.mean()
        return centred / (centred.square().mean() + norm.eps).sqrt() * norm.gain + norm.bias
    return rms(x, norm.gain, norm.eps)


def by_hand(model: Model, ids: Tensor, depth: int) -> list[Tensor]:
    """The losses of one document [S], vector by vector; blocks and ends, which have tests of their own, as they are."""
    length = len(ids)
    sequence = Whole.rows(1, length)
    stream = model.enter(ids[None], sequence)
    for index, block in enumerate(model.blocks):
        stream, _ = block(stream, sequence.at(index))
    residual, hidden = stream.residual, model.norm(model.ends.leave(stream.residual))
    head = model.embedding.weight if model.head is None else model.head.weight
    losses = []
    for d in range(1, depth + 1):
        module: Any = model.mtp[0 if len(model.mtp) == 1 else d - 1]
        join, inputs = module.join, []
        for i in range(length):
            embedded = torch.zeros(model.config.width, dtype=torch.float64)
            if i + d < length:
                embedded = model.embedding.weight[ids[i + d]] * model.config.embedding_scale
            e = normed(join.embedding_norm, embedded)
            if model.config.mtp["scheme"] == "concat":  # type: ignore[index]
                half = model.config.width
                weight = join.projection.weight
                u = weight[:, :half] @ e + weight[:, half:] @ normed(join.hidden_norm, hidden[0, i])
                inputs.append(module.ends.enter(u[None, None])[0, 0])
            else:
                entered = module.ends.enter((join.embedding.weight @ e)[None, None])[0, 0]
                streams = residual[0, i].reshape(-1, model.config.width)
                added = [join.hidden.weight @ normed(join.hidden_norm, stream) for stream in streams]
                inputs.append(entered + torch.stack(added).view_as(entered))
        start = type(stream).start(torch.stack(inputs)[None], {})
        residual = module.block(start, sequence)[0].residual
        hidden = module.norm(module.ends.leave(residual))
        logits = hidden[0] @ head.T
        cap = model.config.logit_cap
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        scored = [F.cross_entropy(logits[i], ids[i + 1 + d], reduction="sum") for i in range(length - 1 - d)]
        losses.append(torch.stack(scored).sum() if scored else logits.sum() * 0)
    return losses


@every_row
def test_equals_the_formulas(row: str, depth: int) -> None:
    """Losses and every gradient; documents of one, two and three tokens have nothing to predict at some depth."""
    model = made(row, depth)
    sizes = [1, 7, 2, 3]
    sequence = packed([sizes])
    ids = tokens(1, sum(sizes))
    further = losses_of(model, ids, sequence, depth).ahead
    expected = [by_hand(model, document, depth) for document in ids[0].split(sizes)]
    for d, loss in enumerate(further):
        torch.testing.assert_close(loss, torch.stack([of[d] for of in expected]).sum(), rtol=1e-9, atol=1e-9)
    ours = gradients(model, torch.stack(further).sum())
    theirs = gradients(model, torch.stack([loss for of in expected for loss in of]).sum())
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() <= 1e-9 * gradient.norm().clamp_min(1.0), name


@every_row
def test_causal(row: str, depth: int) -> None:
    """No prediction of a token before the last one hears of the last one."""
    model, sequence = made(row, depth), Whole.rows(1, 9)
    ids = tokens(1, 9)
    changed = torch.cat((ids[:, :-1], (ids[:, -1:] + 1) % VOCAB), 1)
    losses = []
    for given in (ids, changed):
        targets, ahead = following(given, sequence, depth)
        for d in range(depth):
            ahead.targets[d, :, 9 - 2 - d - 1] = IGNORE  # whose target the last token is
        found = model(given, sequence, targets, ahead=ahead)
        losses.append(found.ahead)
    assert all(loss > 0 for loss in losses[0])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0.0)


@every_row
def test_the_model_is_what_it_is_without(row: str, depth: int) -> None:
    """Its logits, its weights at the start, its loss, and what a cache and a step of decode cost."""
    config = row_with(ROWS[row][0], ROWS[row][1](depth)).config()
    model, plain = made(row, depth), Model(ROWS[row][0].config(), torch.float64).double()
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("mtp.")}
    plain.load_state_dict(own)
    ids, sequence = tokens(2, 9), Whole.rows(2, 9)
    assert torch.equal(model(ids, sequence), plain(ids, sequence))
    losses = losses_of(model, ids, sequence, depth)
    alone = plain(ids, sequence, following(ids, sequence, depth)[0])
    assert torch.equal(losses.cross_entropy, alone.cross_entropy)
    assert len(losses.ahead) == depth and not alone.ahead
    one, other = (cost.meta(c) for c in (config, ROWS[row][0].config()))
    counted = cost.parameters(one)
    assert counted.mtp == sum(p.numel() for name, p in one.named_parameters() if name.startswith("mtp."))
    assert replace(counted, mtp=0) == cost.parameters(other)
    assert cost.flops(one, 1, 50) == cost.flops(other, 1, 50) and cost.mtp_flops(one, 1, 50).total > 0
    assert cost.kv_bytes(one, 50) == cost.kv_bytes(other, 50)
    for fresh in (model, plain):
        fresh.initialise(seed=4)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in plain.state_dict().items())


EXPERTS = row_with(
    Row((layer(dsa(), SIGMOID),)), mtp("concat", dsa(top_k=2), 2, feedforward={**SIGMOID, "experts": 9, "z_loss": 0.1})
)


@pytest.mark.parametrize("shared", [False, True], ids=["a module each", "shared"])
def test_trained(shared: bool) -> None:
    """Every parameter gets a gradient, of routers and indexers too; loads count every depth; recompute is the same."""
    row = row_with(EXPERTS, {**EXPERTS.model["mtp"], "shared": shared})
    model, sequence = row.model_in(torch.float64), packed([[1, 9, 4], [6, 2]])
    ids = tokens(*sequence.position.shape)

    def objective() -> tuple[Tensor, Losses]:
        losses = losses_of(model, ids, sequence, 2)
        return losses.cross_entropy + losses.extra + torch.stack(losses.ahead).sum(), losses

    whole, losses = objective()
    taken = gradients(model, whole)
    assert not {name for name, gradient in taken.items() if not (gradient.isfinite().all() and gradient.norm() > 0)}
    loads = [int(report["load"].sum()) for report in losses.reports]
    each = ids.numel() * SIGMOID["top_k"]
    assert loads == [each, 2 * each] if shared else [each, each, each]
    assert model.trained_names() == (["0", "mtp 1-2"] if shared else ["0", "mtp 1", "mtp 2"])
    after = [buffer for name, buffer in model.named_buffers() if name.endswith("router.bias")]
    before = [buffer.clone() for buffer in after]
    assert len(before) == len(loads)
    model.update_router_biases([report["load"] for report in losses.reports])
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for old, new in zip(before, after, strict=True):
        new.copy_(old)
    recompute(model, "full")
    again = gradients(model, objective()[0])
    assert all(torch.equal(again[name], gradient) for name, gradient in taken.items())


def test_auxiliary_losses_see_nothing_of_the_next_document() -> None:
    """They count every token, also those at a border, for which there is no token ahead."""
    experts = {**SOFTMAX, "balance_loss": 0.0}
    row = row_with(Row((layer(gqa(), experts),)), mtp("concat", gqa(), 2, feedforward=experts))
    model, ids = row.model_in(torch.float64), tokens(1, 11)
    together = losses_of(model, ids, packed([[5, 6]]), 2).extra
    parts = [losses_of(model, part, Whole.rows(1, part.shape[1]), 2).extra for part in ids.split((5, 6), 1)]
    torch.testing.assert_close(11 * together, 5 * parts[0] + 6 * parts[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shared", [False, True], ids=["a module each", "shared"])
def test_declared_flops_are_measured(shared: bool) -> None:
    """Beside the model's own, against PyTorch's counter."""
    further = mtp("streams", mla(), 2, shared, SIGMOID)
    model, ids = row_with(Row((layer(gqa(), SIGMOID),), MHC), further).model_in(torch.float64), tokens(1, 24)
    model.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        losses_of(model, ids, Whole.rows(1, 24), 2)
    declared = cost.flops(model, 24, 24, all_pairs) + cost.mtp_flops(model, 24, 24, all_pairs)
    assert counter.get_total_flops() == declared.total


@pytest.mark.parametrize(
    ("further", "named"),
    [
        pytest.param(mtp("concat", gqa(), 0), "depth", id="depth 0"),
        pytest.param(mtp("concta", gqa(), 1), "concat", id="unknown scheme"),
        pytest.param({**mtp("concat", gqa(), 1), "layer": layer(gqa(), reads=0)}, "reads|read", id="another's state"),
        pytest.param(
            mtp("concat", gqa(), 1, feedforward={**SIGMOID, "router": {"hash_vocab": VOCAB}}), "'ids'", id="hash layer"
        ),
        pytest.param({"scheme": "concat", "depth": 1}, "layer is missing", id="no layer"),
        pytest.param(mtp("concat", {**gqa(), "heads": 3}, 1), r"mtp\.layer\.attention", id="impossible attention"),
    ],
)
def test_what_cannot_be_is_refused(further: Mapping[str, Any], named: str) -> None:
    with pytest.raises(Refused, match=named):
        Model(row_with(Row((layer(gqa()),)), further).config())
