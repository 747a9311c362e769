"""Cross-entropy in chunks: PyTorch's own in value and gradient, without logits of all tokens at once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models import loss
from models.loss import IGNORE
from tests.watch import Watch

VOCAB, WIDTH = 37, 6


@pytest.fixture(params=[1, 8, 1000], ids=lambda tokens: f"{tokens} tokens a chunk")
def chunk(request: pytest.FixtureRequest) -> Iterator[int]:
    """Chunks of this many tokens, by the number of logits that may be held."""
    usual, loss.CHUNK_NUMBERS = loss.CHUNK_NUMBERS, request.param * VOCAB
    yield request.param
    loss.CHUNK_NUMBERS = usual


def inputs(num_tokens: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    hidden = (scale * torch.randn(num_tokens, WIDTH, dtype=dtype)).requires_grad_()
    return hidden, torch.randn(VOCAB, WIDTH, dtype=dtype, requires_grad=True)


def targets_of(kind: str, num_tokens: int) -> Tensor:
    """What to predict, by the kind of case."""
    place = torch.arange(num_tokens)
    left_out = {"all scored": place < 0, "every third left out": place % 3 == 0, "chunks left out": place < 17}
    targets = torch.where(place % 2 == 0, place % VOCAB, VOCAB - 1)
    return targets.masked_fill(left_out.get(kind, place >= 0), IGNORE)


KINDS = ["all scored", "every third left out", "chunks left out", "none scored"]

CAPS = [pytest.param(None, id="not capped"), pytest.param(1.5, id="capped")]


def logits_of(hidden: Tensor, weight: Tensor, cap: float | None) -> Tensor:
    """All of them, by autograd's own operations."""
    logits = hidden @ weight.T
    return logits if cap is None else torch.tanh(logits / cap) * cap


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [1, 8, 29])
@pytest.mark.usefixtures("chunk")
def test_value_and_gradients(num_tokens: int, kind: str, cap: float | None) -> None:
    hidden, weight = inputs(num_tokens)
    targets = targets_of(kind, num_tokens)
    # scaled as a mean over more tokens than are in hand, so that the incoming gradient is not one
    ours = loss.cross_entropy(hidden, weight, targets, cap) / 7
    theirs = F.cross_entropy(logits_of(hidden, weight, cap), targets, ignore_index=IGNORE, reduction="sum") / 7
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(ours, (hidden, weight))
    for gradient, expected in zip(gradients, torch.autograd.grad(theirs, (hidden, weight)), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
@pytest.mark.usefixtures("chunk")
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    hidden, weight = inputs(29)
    expected = torch.autograd.grad(loss.cross_entropy(hidden, weight, targets_of("all scored", 29)), (hidden, weight))
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    value = loss.cross_entropy(hidden, weight, targets_of("all scored", 29))
    assert value.requires_grad == (frozen != "both")
    if frozen != "both":
        (gradient,) = torch.autograd.grad(value, weight if frozen == "hidden" else hidden)
        assert torch.equal(gradient, expected[frozen == "hidden"])


def test_logits_of_all_tokens_are_never_held(chunk: int) -> None:
    hidden, weight = inputs(29)
    with Watch() as watch:
        loss.cross_entropy(hidden, weight, targets_of("all scored", 29)).backward()
        loss.score(hidden.detach(), weight.detach(), targets_of("all scored", 29))
    widest = max(torch.Size(shape).numel() for shape in watch.shapes if VOCAB in shape)
    assert widest == max(VOCAB * min(chunk, 29), weight.numel())


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("chunk")
def test_scores(kind: str, cap: float | None) -> None:
    hidden, weight = inputs(29)
    targets = targets_of(kind, 29)
    losses, hits = loss.score(hidden, weight, targets, cap)
    logits = logits_of(hidden, weight, cap)
    torch.testing.assert_close(losses, F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none"))
    assert torch.equal(hits, logits.argmax(1) == targets)
    assert not losses[targets == IGNORE].any()


@pytest.mark.usefixtures("chunk")
def test_bfloat16_is_near_float32_and_sums_in_it() -> None:
    hidden, weight = inputs(300, torch.float32)
    targets = targets_of("all scored", 300)
    exact = loss.cross_entropy(hidden, weight, targets)
    half = loss.cross_entropy(hidden.bfloat16(), weight, targets)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=1e-2, atol=0.0)
    for gradient, expected in zip(
        torch.autograd.grad(half, (hidden, weight)), torch.autograd.grad(exact, (hidden, weight)), strict=True
    ):
        assert gradient.dtype == torch.float32
        assert (gradient - expected).norm() < 0.02 * expected.norm()


@pytest.mark.usefixtures("chunk")
def test_logits_far_from_zero_do_not_overflow() -> None:
    hidden, weight = inputs(29, torch.float32, scale=1e4)
    value = loss.cross_entropy(hidden, weight, targets_of("all scored", 29))
    assert value.isfinite()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(value, (hidden, weight)))


def test_compiled_is_the_same() -> None:
    """The chunk's loss and gradient, as they are compiled for a GPU."""
    logits, targets = torch.randn(8, VOCAB, dtype=torch.float64), targets_of("every third left out", 8)
    compiled = torch.compile(loss._loss_and_gradient, backend="aot_eager", fullgraph=True, dynamic=False)
    for cap in (None, 1.5):
        for ours, theirs in zip(
            compiled(logits, targets, cap), loss._loss_and_gradient(logits, targets, cap), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
