"""Recompute changes no gradient, keeps less, and never chooses again."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from conf.compose import compose
from conf.schema import Refused
from models.model import Losses, Model
from models.moe.router import Router
from models.sequence import Whole
from parallel.recompute import Recompute, recompute
from tests.runs import TINY
from train.config import read

ROWS = 2
LENGTHS = {False: 300, True: 40}  # eager: beyond a block of the blockwise core, which recomputes by itself


@pytest.fixture(autouse=True)
def budget() -> Iterator[None]:
    with torch._functorch.config.patch(activation_memory_budget=1.0):
        yield


def model(what: Recompute, compiled: bool, dtype: torch.dtype) -> Model:
    layers = (
        f"model.layers=[{{repeat: {1 if compiled else 2}, of: [{{attention: ${{attention}}, feedforward: ${{moe}}}}]}}]"
    )
    config = read(compose([*TINY, layers, "run.dir=x", "moe.balance_loss=0.1", "moe.z_loss=0.1"]))
    made = Model(config.model, dtype).to(dtype)
    made.initialise(0)
    recompute(made, what)
    if compiled:
        torch._dynamo.reset()
        for block in made.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
    return made


def forward(made: Model, length: int) -> tuple[Tensor, int]:
    """The loss, and the bytes that its backward keeps besides the parameters."""
    ids = torch.randint(0, 64, (ROWS, length), generator=torch.Generator().manual_seed(0))
    owned = {parameter.untyped_storage().data_ptr() for parameter in made.parameters()}
    kept: dict[int, Tensor] = {}  # the tensors themselves, so that no storage is used again

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in owned:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = made(ids, Whole.rows(ROWS, length), ids)
    assert isinstance(losses, Losses)
    return losses.cross_entropy + losses.extra, sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def choose_others(made: Model) -> None:
    """From now on the routers choose other experts; beside autograd's back, as rounding would."""
    for module in made.modules():
        if isinstance(module, Router):
            assert module.bias is not None
            module.bias.data += torch.tensor([9.0, 0.0, -9.0, 3.0], dtype=module.bias.dtype)


@functools.cache
def measured(what: Recompute, compiled: bool, dtype: torch.dtype) -> tuple[int, dict[str, Tensor]]:
    """Bytes kept, and the gradients."""
    made = model(what, compiled, dtype)
    loss, kept = forward(made, LENGTHS[compiled])
    choose_others(made)
    loss.backward()
    found = {name: parameter.grad for name, parameter in made.named_parameters() if parameter.grad is not None}
    assert len(found) > 10
    return kept, found


KINDS: list[Any] = ["full", "attention", "feedforward", "experts"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("what", KINDS)
def test_gradients_are_those_of_keeping_all(what: Recompute, dtype: torch.dtype) -> None:
    """Bit for bit, though another forward would choose other experts by then."""
    expected = measured("none", False, dtype)[1]
    found = measured(what, False, dtype)[1]
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("what", ["full", 0.5])
def test_so_are_they_when_compiled(what: Recompute) -> None:
    expected = measured("none", True, torch.float64)[1]
    found = measured(what, True, torch.float64)[1]
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize(
    ("less", "more"),
    [
        pytest.param("full", "feedforward", id="full < feedforward"),
        pytest.param("feedforward", "experts", id="feedforward < experts"),
        pytest.param("experts", "none", id="experts < none"),
        pytest.param("full", "attention", id="full < attention"),
        pytest.param("attention", "none", id="attention < none"),
    ],
)
def test_what_is_recomputed_is_not_kept(less: Recompute, more: Recompute) -> None:
    assert measured(less, False, torch.float64)[0] < 0.95 * measured(more, False, torch.float64)[0]


def test_a_budget_keeps_its_share() -> None:
    kept = {what: measured(what, True, torch.float64)[0] for what in ("none", 0.5, "full")}
    assert 0.3 < (kept[0.5] - kept["full"]) / (kept["none"] - kept["full"]) < 0.7  # PyTorch measures otherwise


def test_full_keeps_what_enters_the_blocks_and_what_was_chosen() -> None:
    kept, _ = measured("full", False, torch.float64)
    num_tokens = ROWS * LENGTHS[False]
    residual, chosen = num_tokens * 16 * 8, num_tokens * 2 * 8
    outside = 6 * residual  # embedding, last norm, loss; positions and documents
    assert 2 * (residual + chosen) <= kept <= 2 * (residual + chosen) + outside


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        pytest.param(["train.recompute=0.5"], "needs compile", id="a budget without a compiler"),
        pytest.param(
            ["train.recompute=1", "train.compile=true", "train.compute=bf16"], "between 0 and 1", id="no share"
        ),
        pytest.param(["train.recompute=atention"], "none, full, attention", id="no such kind"),
    ],
)
def test_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        read(compose([*TINY, "run.dir=x", *overrides]))


def test_a_model_without_experts_recomputes_none() -> None:
    tiny = [override for override in TINY if not override.startswith("moe.")]
    dense = "model.layers=[{repeat: 1, of: [{attention: ${attention}, feedforward: {scheme: dense, hidden: 8}}]}]"
    made = Model(read(compose([*tiny, "run.dir=x", dense])).model)
    with pytest.raises(Refused, match="recompute is experts, but the model has none"):
        recompute(made, "experts")
