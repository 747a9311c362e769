"""Gemma 4 as it ships: the released sizes, and what its cache holds with and without sharing, windows and keys."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from models import cost
from models.__main__ import main
from models.config import LayerPlan, ModelConfig, Stack
from models.families import gemma4_text
from models.families.common import plan
from tests.test_catalog import costed, refuses, shipped

SLIDING, FULL = "sliding_attention", "full_attention"

SMALL = {"num_attention_heads": 8, "hidden_size_per_layer_input": 256, "sliding_window": 512}
LARGE = {"attention_k_eq_v": True, "hidden_size_per_layer_input": 0, "sliding_window": 1024}

# The keys that decide the model, by the releases' own names.
RELEASED: dict[str, dict[str, Any]] = {
    "gemma4_e2b": {
        **SMALL,
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "num_hidden_layers": 35,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 20,
        "use_double_wide_mlp": True,
        "layer_types": [SLIDING, SLIDING, SLIDING, SLIDING, FULL] * 7,
    },
    "gemma4_e4b": {
        **SMALL,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 42,
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 18,
    },
    "gemma4_26b_a4b": {
        **LARGE,
        "hidden_size": 2816,
        "intermediate_size": 2112,
        "num_hidden_layers": 30,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 2,
        "enable_moe_block": True,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
    },
    "gemma4_31b": {
        **LARGE,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_hidden_layers": 60,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "num_global_key_value_heads": 4,
    },
}


@pytest.mark.parametrize("name", RELEASED)
def test_shipped_models_are_the_released_ones(name: str) -> None:
    released = gemma4_text.config_from({**RELEASED[name], "final_logit_softcapping": 30.0})
    assert not plan.difference(shipped(name), replace(released, std=shipped(name).std))


@pytest.mark.parametrize("size", ["", "_tiny"])
@pytest.mark.parametrize("name", RELEASED)
def test_shipped_models_can_be_exported(name: str, size: str) -> None:
    assert not refuses(gemma4_text, shipped(name + size))


@pytest.mark.parametrize(
    ("name", "total", "active", "looked_up"),
    [
        pytest.param("gemma4_e2b", 4_628_569_344, 2_279_759_104, 262_144 * 8960, id="e2b"),
        pytest.param("gemma4_e4b", 7_463_013_376, 4_644_441_088, 262_144 * 10752, id="e4b"),
        pytest.param("gemma4_26b_a4b", 25_233_141_760, 3_822_530_560, 0, id="26b_a4b"),
        pytest.param("gemma4_31b", 30_697_345_280, 30_697_345_280, 0, id="31b"),
    ],
)
def test_text_totals_to_the_last_digit(name: str, total: int, active: int, looked_up: int) -> None:
    """Of the released language models; their count leaves out each layer's scalar, which is a parameter here."""
    model = costed(name)
    size = cost.parameters(model)
    assert size == cost.Parameters(total + len(model.blocks), active + len(model.blocks), looked_up)


PARTS = [
    pytest.param("gemma4_e2b", "attention.attention", 278.4, id="e2b attention"),
    pytest.param("gemma4_e4b", "attention.attention", 587.2, id="e4b attention"),
    pytest.param("gemma4_26b_a4b", "attention.attention", 1110.2, id="26b attention"),
    pytest.param("gemma4_31b", "attention.attention", 8477.8, id="31b attention"),
    pytest.param("gemma4_e2b", "feedforward.feedforward", 1557.1, id="e2b dense"),
    pytest.param("gemma4_e4b", "feedforward.feedforward", 3303.0, id="e4b dense"),
    pytest.param("gemma4_31b", "feedforward.feedforward", 20809.0, id="31b dense"),
    pytest.param("gemma4_26b_a4b", "feedforward.feedforward.shared", 535.3, id="26b dense"),
    pytest.param("gemma4_26b_a4b", "feedforward.feedforward.experts", 22838.0, id="26b experts"),
    pytest.param("gemma4_26b_a4b", "feedforward.feedforward.router", 10.8, id="26b router"),
    pytest.param("gemma4_e2b", "injection.feedforward.context", 13.8, id="e2b projection of the embedding"),
    pytest.param("gemma4_e4b", "injection.feedforward.context", 27.5, id="e4b projection of the embedding"),
]


@pytest.mark.parametrize(("name", "part", "millions"), PARTS)
def test_sizes_of_parts(name: str, part: str, millions: float) -> None:
    found = [block.get_submodule(part) for block in costed(name).blocks]
    held = sum(parameter.numel() for module in found for parameter in module.parameters())
    assert held / 1e6 == pytest.approx(millions, abs=0.05)


CONTEXTS = ("4096", "131072", "1048576")


def costs(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["cost", *words, "--context", ",".join(CONTEXTS), "--json"]) == 0
    read: dict[str, Any] = json.loads(capsys.readouterr().out)
    return read


# bytes of the sheet's tables, MB or GB of 10⁶ or 10⁹ as published counts are
@pytest.mark.parametrize(
    ("name", "windowed", "naive_per_token", "naive"),
    [
        pytest.param("gemma4_e2b", (31.5e6, 0.812e9, 6.449e9), 18_432, (75.5e6, 2.416e9, 19.33e9), id="e2b"),
        pytest.param("gemma4_e4b", (88.1e6, 2.168e9, 17.20e9), 57_344, (234.9e6, 7.516e9, 60.13e9), id="e4b"),
        pytest.param("gemma4_26b_a4b", (293.6e6, 2.894e9, 21.685e9), 225_280, (922.7e6, 29.53e9, 236.2e9), id="26b"),
        pytest.param("gemma4_31b", (1.174e9, 11.58e9, 86.74e9), 901_120, (3.691e9, 118.1e9, 944.9e9), id="31b"),
    ],
)
def test_cache_with_and_without_windows(
    name: str,
    windowed: tuple[float, ...],
    naive_per_token: int,
    naive: tuple[float, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = costs(capsys, name)[name]
    assert tuple(found["kv_bytes"].values()) == pytest.approx(windowed, rel=2e-3)
    assert found["naive_kv_bytes_per_token"] == naive_per_token
    assert tuple(found["naive_kv_bytes"].values()) == pytest.approx(naive, rel=2e-3)


def changed(config: ModelConfig, change: Callable[[LayerPlan], LayerPlan]) -> ModelConfig:
    """Every layer's plan changed."""
    return replace(config, layers=[Stack(list(map(change, stack.of)), stack.repeat) for stack in config.layers])


def unshared(layer: LayerPlan) -> LayerPlan:
    return replace(layer, reads=None)


def keeping_values(layer: LayerPlan) -> LayerPlan:
    tied = layer.attention["scheme"] == "tied_kv"
    return replace(layer, attention={**layer.attention, "keeps": "value"}) if tied else layer


@pytest.mark.parametrize(
    ("name", "saved", "saved_naive"),
    [
        pytest.param("gemma4_e2b", (41.9e6, 1.082e9, 8.598e9), (100.7e6, 3.221e9, 25.77e9), id="e2b"),
        pytest.param("gemma4_e4b", (66.1e6, 1.626e9, 12.90e9), (176.2e6, 5.637e9, 45.10e9), id="e4b"),
    ],
)
def test_sharing_saves_capacity_and_no_reads(
    name: str, saved: tuple[float, ...], saved_naive: tuple[float, ...]
) -> None:
    shared, alone = (cost.meta(config) for config in (shipped(name), changed(shipped(name), unshared)))
    for context, fewer, fewer_naive in zip(map(int, CONTEXTS), saved, saved_naive, strict=True):
        for naive, expected in ((False, fewer), (True, fewer_naive)):
            held = [cost.kv_bytes(model, context, naive=naive)["total"] for model in (alone, shared)]
            assert held[0] - held[1] == pytest.approx(expected, rel=2e-3)
        assert cost.read_bytes_per_step(shared, context) == cost.read_bytes_per_step(alone, context)


def test_the_claim_of_the_press_counts_neither_windows_nor_wide_heads() -> None:
    """2.7 GB at 128K: 20 layers of one KV head of 256, all tokens kept; four of them are 512 wide, and sixteen keep
    512 tokens."""
    shared = shipped("gemma4_e2b")
    held = [cost.kv_bytes(cost.meta(config), 131_072)["total"] for config in (changed(shared, unshared), shared)]
    assert held[0] - held[1] == 1_082_130_432
    assert 20 * 2 * 256 * 2 * 131_072 == 2_684_354_560


@pytest.mark.parametrize(
    ("name", "values"),
    [
        pytest.param("gemma4_26b_a4b", (251.7e6, 1.552e9, 10.95e9), id="26b"),
        pytest.param("gemma4_31b", (1.007e9, 6.208e9, 43.79e9), id="31b"),
    ],
)
def test_values_alone_halve_the_full_layers(name: str, values: tuple[float, ...]) -> None:
    model = cost.meta(changed(shipped(name), keeping_values))
    assert not refuses(gemma4_text, model.config)
    for context, expected in zip(map(int, CONTEXTS), values, strict=True):
        assert cost.kv_bytes(model, context)["total"] == pytest.approx(expected, rel=2e-3)
