"""ZAYA1 against Transformers' own implementation, and its published sizes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from conf import schema
from models import catalog, cost
from models.cache import Cache
from models.config import ModelConfig
from models.model import Model
from tests.test_families import SEEDS, assert_equal, common, reference

SHEET = "zaya1_8b"


def zaya(draw: random.Random) -> dict[str, Any]:
    config = common(draw)
    heads = config["num_attention_heads"]
    layers = config["num_hidden_layers"]
    kinds = [draw.choice(["hybrid", "hybrid_sliding"]) for _ in range(layers)]
    share = draw.choice([0.5, 1.0])
    bases = {"hybrid": 5e6, "hybrid_sliding": draw.choice([50.0, 1e4])}
    return config | {
        "hidden_size": draw.randint(5, 20),
        "num_key_value_heads": draw.choice([n for n in range(1, heads + 1) if heads % n == 0]),
        "head_dim": draw.choice([4, 8]),
        "layer_types": kinds,
        "sliding_window": draw.choice([1, 3, 7]),
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": bases[kind], "partial_rotary_factor": share} for kind in bases
        },
        "moe_intermediate_size": draw.randint(4, 12),
        "num_experts": draw.randint(2, 5),
        "router_hidden_size": draw.randint(4, 9),
        "attention_bias": draw.random() < 0.3,
        "cca_time0": draw.choice([1, 2, 3]),
        "cca_time1": draw.choice([1, 2, 3]),
        "pad_token_id": None,
    }


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: f"seed{seed:02}")
def test_equals_transformers(seed: int, tmp_path: Path) -> None:
    draw = random.Random(f"zaya {seed}")
    torch.manual_seed(seed)
    assert_equal(reference("zaya", **zaya(draw)), draw, tmp_path, 1e-4)


def shipped() -> Model:
    return cost.meta(schema.build(ModelConfig, catalog.section(SHEET, {}), SHEET))


def numbers(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_sizes_are_the_published_ones() -> None:
    model = shipped()
    size, layer = cost.parameters(model), dict(model.depths()[1].named_modules())
    assert (size.total, size.active) == (8_840_488_784, 1_290_741_584)
    assert numbers(layer["attention.attention"]) == 5_575_682
    assert numbers(layer["feedforward.feedforward.router"]) == 660_992
    assert numbers(layer["feedforward.feedforward.experts"]) == 201_326_592


def test_the_cache_is_the_published_one() -> None:
    model = shipped()
    assert cost.kv_bytes_per_token(model) == 40_960
    assert cost.kv_bytes(model, 4096)["tails"] == 215_040
    assert sum(Cache(model, 1, 4096, "meta").num_bytes().values()) >= 160 * 2**20


def test_balancing_lifts_the_idle_and_lowers_the_busy() -> None:
    model = Model(schema.build(ModelConfig, catalog.section("zaya1_8b_tiny", {}), "tiny"))
    model.initialise(0)
    router: Any = model.get_submodule("blocks.0.feedforward.feedforward.router")
    assert router.bias.tolist() == [0.0] * 8 + [-1.0]
    for _ in range(50):
        model.depths()[0].update_bias(torch.tensor([90, 10, 0, 0, 0, 0, 0, 0, 0]))
    assert router.bias[0] < -0.04 and (router.bias[2:8] > 0.04).all()
    assert router.bias_steps.item() == 50
