"""The models that ship are the released ones: their configurations, and the sizes that their authors publish."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from torch import nn

from conf.schema import Refused, build
from models import catalog, cost
from models.config import ModelConfig
from models.families.common import plan, published
from models.model import Model
from models.storage import Storage
from tests.released import RELEASED

PACKED = Storage("packed")


def shipped(name: str) -> ModelConfig:
    return build(ModelConfig, catalog.section(name, {}), name)


@cache
def costed(name: str) -> Model:
    """As it ships, without memory; nobody changes it."""
    return cost.meta(shipped(name))


@pytest.mark.parametrize("name", RELEASED)
def test_shipped_models_are_the_released_ones(name: str) -> None:
    family = published.family(RELEASED[name]["model_type"], "")
    released = family.config_from(RELEASED[name])
    assert not plan.difference(shipped(name), replace(released, std=shipped(name).std))


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("size", ["", "_tiny"])
def test_shipped_models_can_be_exported(name: str, size: str) -> None:
    config = shipped(name + size)
    families = [published.family(model_type, "") for model_type in published.available()]
    fitting = [family for family in families if not refuses(family, config)]
    assert len(fitting) == 1


def refuses(family: published.Family, config: ModelConfig) -> bool:
    try:
        family.config_to(config)
    except Refused:
        return True
    return False


@pytest.mark.parametrize(
    ("name", "total", "with_mtp", "active"),
    [
        pytest.param("deepseek_v3", 671.026, 682.6, 36.6, id="deepseek_v3"),
        pytest.param("deepseek_v32", 671.878, 683.5, 37.5, id="deepseek_v32"),
        pytest.param("glm5_1", 743.911, 753.9, 40.8, id="glm5_1"),
        pytest.param("kimi_k2_6", 1026.408, 1026.4, 31.7, id="kimi_k2_6"),
        # published: 284B, and 1.6T with the multi-token prediction block
        pytest.param("deepseek_v4_flash", 284.3, 290.9, 13.3, id="deepseek_v4_flash"),
        pytest.param("deepseek_v4_pro", 1573.0, 1598.8, 48.9, id="deepseek_v4_pro"),
        # both releases count the embedding's rows among the active parameters (12.9 and 3.3); we do not
        pytest.param("mixtral_8x7b", 46.7, 46.7, 12.9 - 0.131, id="mixtral_8x7b"),
        pytest.param("qwen3_30b_a3b", 30.5, 30.5, 3.35 - 0.311, id="qwen3_30b_a3b"),
    ],
)
def test_published_sizes_in_billions(name: str, total: float, with_mtp: float, active: float) -> None:
    size = cost.parameters(costed(name))
    assert (size.total + size.mtp) / 1e9 == pytest.approx(with_mtp, abs=0.05)
    assert size.total / 1e9 == pytest.approx(total, abs=0.05)
    assert size.active / 1e9 == pytest.approx(active, abs=0.05)


@pytest.mark.parametrize(
    ("name", "attention", "expert", "router", "dense"),
    [
        pytest.param("deepseek_v3", 187.107, 44.040, 1.835, 396.362, id="deepseek_v3"),
        pytest.param("deepseek_v32", 187.107 + 13.959, 44.040, 1.835, 396.362, id="deepseek_v32"),
        pytest.param("glm5_1", 165.022 + 9.372, 37.749, 1.573, 226.492, id="glm5_1"),
        pytest.param("kimi_k2_6", 101.124, 44.040, 2.753, 396.362, id="kimi_k2_6"),
    ],
)
def test_published_sizes_of_parts_in_millions(
    name: str, attention: float, expert: float, router: float, dense: float
) -> None:
    first, last = (costed(name).blocks[i] for i in (0, -1))

    def size(block: nn.Module, part: str) -> float:
        return sum(parameter.numel() for parameter in block.get_submodule(part).parameters()) / 1e6

    assert size(first, "attention.attention") == pytest.approx(attention, abs=1e-3)
    assert size(first, "feedforward.feedforward") == pytest.approx(dense, abs=5e-4)
    assert size(last, "feedforward.feedforward.shared") == pytest.approx(expert, abs=5e-4)
    assert size(last, "feedforward.feedforward.router") == pytest.approx(router, abs=5e-4)


@pytest.mark.parametrize(
    ("name", "attention", "csa", "indexer", "hca", "mhc", "expert", "router"),
    [
        pytest.param("deepseek_v4_flash", 106.956, 8.393, 10.749, 4.260, 0.786, 25.166, 1.049, id="flash"),
        pytest.param("deepseek_v4_pro", 299.895, 14.685, 16.713, 7.406, 1.376, 66.060, 2.753, id="pro"),
    ],
)
def test_sizes_of_the_parts_of_deepseek_v4_in_millions(
    name: str, attention: float, csa: float, indexer: float, hca: float, mhc: float, expert: float, router: float
) -> None:
    """A pair of layers, sparse and heavily compressed, both with a learned router."""
    blocks = costed(name).depths()
    sparse, heavy = blocks[4], blocks[3]

    def size(block: nn.Module, *parts: str) -> float:
        found = [p.numel() for n, p in block.named_parameters() if any(n.startswith(part) for part in parts)]
        return sum(found) / 1e6

    inside = "attention.attention."
    whole, compressor = size(heavy, inside), size(heavy, inside + "compressor")
    assert compressor == pytest.approx(hca, abs=5e-4)
    assert whole - compressor == pytest.approx(attention, abs=5e-4)
    assert size(sparse, inside + "compressor") == pytest.approx(csa, abs=5e-4)
    assert size(sparse, inside + "index_query", inside + "index_compressor") == pytest.approx(indexer, abs=5e-4)
    assert size(sparse, "attention.residual", "feedforward.residual") == pytest.approx(mhc, abs=5e-4)
    assert size(sparse, "feedforward.feedforward.shared") == pytest.approx(expert, abs=5e-4)
    assert size(sparse, "feedforward.feedforward.router") == pytest.approx(router, abs=5e-4)


@pytest.mark.parametrize(
    ("name", "per_token", "gigabytes", "megabytes_at_4096"),
    [
        pytest.param("deepseek_v4_pro", 5031.4, 5.280, 25.2, id="pro"),
        pytest.param("deepseek_v4_flash", 3514.3, 3.688, 17.6, id="flash"),
    ],
)
def test_published_cache_of_deepseek_v4(
    name: str, per_token: float, gigabytes: float, megabytes_at_4096: float
) -> None:
    """As its kernels pack it: entries in fp8 and bf16, index keys in fp4; the tails of open blocks left out."""
    model = costed(name)
    assert cost.kv_bytes_per_token(model, PACKED) == pytest.approx(per_token, abs=0.06)
    for context, unit, expected, digit in ((1_048_576, 1e9, gigabytes, 1e-3), (4096, 1e6, megabytes_at_4096, 0.1)):
        held = cost.kv_bytes(model, context, PACKED)
        assert (held["entries"] + held["windows"]) / unit == pytest.approx(expected, abs=digit / 2)


@pytest.mark.parametrize(
    ("name", "linear", "attention", "index"),
    [
        pytest.param("deepseek_v4_pro", 97.7, 147.2 / 2, 61.4 * 2, id="pro"),
        pytest.param("deepseek_v4_flash", 26.5, 45.2 / 2, 43.0 * 2, id="flash"),
        pytest.param("deepseek_v32", 75.0, 69.6 / 2, 999.4, id="v3.2"),
    ],
)
def test_operations_of_a_decode_step_in_billions(name: str, linear: float, attention: float, index: float) -> None:
    """At a million tokens, each operation counted once whatever its precision."""
    flops = cost.flops(costed(name), 1, 1_000_000)
    # V3.2 counts its latent's expansion as a parameter that is read; absorbed, it multiplies the queries
    assert flops.projections / 1e9 == pytest.approx(linear, rel=5e-3)
    assert flops.scores / 1e9 == pytest.approx(attention, rel=1e-3)
    assert flops.selection / 1e9 == pytest.approx(index, rel=1e-3)


@pytest.mark.parametrize(
    ("store", "pro", "flash"),
    [
        pytest.param(PACKED, 10.48, 7.32, id="as packed"),
        pytest.param(Storage("packed", {"index": "fp8"}), 11.5, 8.0, id="index keys in fp8"),
        pytest.param(Storage("bf16"), 11.5, 8.0, id="all in bf16"),
        pytest.param(Storage("packed", {"latent": "bf16"}), 6.4, 4.5, id="latents of V3.2 in bf16"),
    ],
)
def test_formats_behind_what_deepseek_v4_saves(store: Storage, pro: float, flash: float) -> None:
    """Percent of DeepSeek-V3.2's cache at a million tokens: the first is published."""
    base, *ours = (cost.kv_bytes(costed(f"deepseek_{v}"), 2**20, store) for v in ("v32", "v4_pro", "v4_flash"))
    percent = [100 * (held["entries"] + held["windows"]) / base["total"] for held in ours]
    assert percent == pytest.approx([pro, flash], abs=0.05 if store is not PACKED else 5e-3)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        pytest.param("deepseek_v4_pro", 3.9, id="pro"),
        pytest.param("deepseek_v4_flash", 1.8, id="flash"),
        pytest.param("deepseek_v32", 2.1, id="v3.2"),
    ],
)
def test_what_stays_in_bf16_when_weights_are_fp8(name: str, kept: float) -> None:
    """Billions of operations: head, router, an indexer's weights, compressors, hyper-connections."""
    model = costed(name)
    plain, weighted = cost.flops(model, 1, 4096), cost.weighted(model, 1, 4096, PACKED, "fp8")
    assert (2 * weighted.projections - plain.projections) / 1e9 == pytest.approx(kept, abs=0.05)
    assert cost.weighted(model, 1, 4096, PACKED, "fp4").projections == weighted.projections
    assert cost.weighted(model, 1, 4096, Storage("bf16")) == plain
