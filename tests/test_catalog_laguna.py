"""Laguna XS.2 as it ships: the released sizes, its head counts by layer, and what its cache holds."""

from __future__ import annotations

import pytest
import torch

from models import cost
from models.attention import gqa
from models.config import resolve
from tests.test_catalog import costed, shipped

SELECTION_BIASES = 39 * 256
"""Parameters in Transformers, numbers that no optimizer sees here."""

LOOKED_UP = 100_352 * 2048


def test_totals_to_the_last_digit() -> None:
    """The published counts; the active ones have the embedding's table among them, which ours have not."""
    size = cost.parameters(costed("laguna_xs2"))
    total, active = 33_442_617_088 - SELECTION_BIASES, 3_017_135_872 - SELECTION_BIASES - LOOKED_UP
    assert size == cost.Parameters(total, active, LOOKED_UP)


@pytest.mark.parametrize(
    ("part", "millions"),
    [
        pytest.param("attention.attention", 1431.0, id="attention"),
        pytest.param("feedforward.feedforward.experts", 31_406.9, id="experts"),
        pytest.param("feedforward.feedforward.shared", 122.7, id="shared experts"),
        pytest.param("feedforward.feedforward.router", 20.4, id="routers"),
    ],
)
def test_sizes_of_parts(part: str, millions: float) -> None:
    blocks = costed("laguna_xs2").blocks
    start = 0 if part.startswith("attention") else 1
    held = [p.numel() for block in list(blocks)[start:] for p in block.get_submodule(part).parameters()]
    assert sum(held) / 1e6 == pytest.approx(millions, abs=0.06)


def test_full_layers_have_fewer_heads_and_turn_half_of_each() -> None:
    attentions = [layer.attention for layer in resolve(shipped("laguna_xs2"))]
    for depth, attention in enumerate(attentions):
        assert isinstance(attention, gqa.Config)
        full = depth % 4 == 0
        assert (attention.heads, attention.window) == ((48, None) if full else (64, 512))
        assert attention.rotated_dim == (64 if full else 128)
    rope = attentions[0].rope
    kept = rope.frequencies(64, torch.device("cpu"), torch.float64) * rope.base ** (torch.arange(32) / 32)
    assert kept[:6].tolist() == pytest.approx([1.0] * 6)
    assert kept[[6, 7, 15]].tolist() == pytest.approx([0.9119, 0.8239, 0.1193], abs=5e-5)
    assert kept[16:].tolist() == pytest.approx([1 / 32] * 16)


@pytest.mark.parametrize(
    ("context", "windowed", "naive"),
    [
        pytest.param(4096, 230.7e6, 671.1e6, id="4K"),
        pytest.param(131_072, 5.432e9, 21.47e9, id="128K"),
        pytest.param(262_144, 10.80e9, 42.95e9, id="256K"),
        pytest.param(1_048_576, 43.01e9, 171.8e9, id="1M"),
    ],
)
def test_cache_with_and_without_windows(context: int, windowed: float, naive: float) -> None:
    model = costed("laguna_xs2")
    assert cost.kv_bytes(model, context)["total"] == 10 * 4096 * context + 30 * 4096 * min(context, 512)
    assert cost.kv_bytes(model, context)["total"] == pytest.approx(windowed, rel=5e-4)
    assert cost.kv_bytes(model, context, naive=True)["total"] == pytest.approx(naive, rel=5e-4)
    assert cost.kv_bytes_per_token(model) == 40 * 1024


def test_operations_of_a_decode_step_far_into_a_context() -> None:
    """At 128K: ten layers of 48 heads over everything, thirty of 64 over a window."""
    scores = cost.flops(costed("laguna_xs2"), 1, 131_072).scores
    assert scores / 1e9 == pytest.approx(32.2 + 0.50, abs=0.05)
