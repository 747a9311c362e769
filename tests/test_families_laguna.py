"""Laguna against Transformers' own implementation: heads, windows and rotations by layer, gates of either kind."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from conf.schema import Refused, build
from models.config import ModelConfig
from models.model import Model
from models.sequence import Whole
from models.weights import export_model, load_model, open_weights, save_model
from tests.schemes import packed
from tests.test_families import SEEDS, assert_equal, assert_near, common, edit_config, edit_tensors, reference, rope

SLIDING, FULL = "sliding_attention", "full_attention"


def laguna(draw: random.Random) -> dict[str, Any]:
    config = common(draw)
    layers, kv_heads, head_dim = draw.randint(1, 4), draw.choice([1, 2]), draw.choice([4, 8])
    experts = draw.randint(2, 5)
    shares = [share for share in (0.25, 0.5, 0.75, 1.0) if share * head_dim % 2 == 0]
    return config | {
        "num_hidden_layers": layers,
        "hidden_size": draw.randint(5, 20),
        "intermediate_size": draw.randint(4, 24),
        "num_attention_heads": kv_heads,
        "num_attention_heads_per_layer": [kv_heads * draw.randint(1, 3) for _ in range(layers)],
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "attention_bias": draw.random() < 0.2,
        "gating": draw.choice([True, "per-head", "per-element"]),
        "layer_types": [draw.choice([SLIDING, FULL]) for _ in range(layers)],
        "mlp_layer_types": [draw.choice(["dense", "sparse"]) for _ in range(layers)],
        "sliding_window": draw.choice([1, 3, 7]),
        "rope_parameters": rotations(draw, shares),
        "num_experts": experts,
        "num_experts_per_tok": draw.randint(2, experts),
        "moe_intermediate_size": draw.randint(4, 12),
        "shared_expert_intermediate_size": draw.choice([0, 3, 8]),
        "moe_routed_scaling_factor": draw.choice([1.0, 2.5]),
    }


def rotations(draw: random.Random, shares: list[float]) -> dict[str, Any]:
    kinds = {kind: rope(draw) | {"partial_rotary_factor": draw.choice(shares)} for kind in (SLIDING, FULL)}
    truncate = draw.random() < 0.7
    for kind in kinds.values():
        kind.pop("truncate", None)
    return kinds if truncate else kinds | {"truncate": False}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: f"seed{seed:02}")
def test_equals_transformers(seed: int, tmp_path: Path) -> None:
    draw = random.Random(f"laguna {seed}")
    torch.manual_seed(seed)
    assert_equal(reference("laguna", **laguna(draw)), draw, tmp_path)


SIZES: dict[str, Any] = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_attention_heads_per_layer": [2, 4, 4],
    "num_key_value_heads": 2,
    "head_dim": 8,
    "layer_types": [FULL, SLIDING, SLIDING],
    "sliding_window": 3,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 6,
    "shared_expert_intermediate_size": 5,
    "moe_routed_scaling_factor": 2.5,
}

IDS = torch.arange(11)[None]


def logits_of(folder: Path) -> Tensor:
    logits = load_model(folder)(IDS, Whole.rows(1, 11))
    assert isinstance(logits, Tensor)
    return logits


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    def save(**values: Any) -> Path:
        reference("laguna", **SIZES, **values).save_pretrained(tmp_path / "hf")
        return tmp_path / "hf"

    return save


def test_the_names_of_transformers_memory_are_read_too(tmp_path: Path) -> None:
    theirs = reference("laguna", **SIZES)
    theirs.config.save_pretrained(tmp_path)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    assert any("shared_experts." in name for name in theirs.state_dict())
    assert_near(logits_of(tmp_path), theirs(IDS).logits, "logits")


def test_packed_documents(tmp_path: Path) -> None:
    theirs = reference("laguna", **SIZES)
    theirs.save_pretrained(tmp_path)
    sequence, ids = packed([[7, 1, 9]]), torch.randint(11, (1, 17))
    logits = load_model(tmp_path)(ids, sequence)
    assert isinstance(logits, Tensor)
    assert_near(logits, theirs(ids, position_ids=sequence.position, use_cache=False).logits, "logits")
    assert_near(logits[:, 8:], theirs(ids[:, 8:]).logits, "the last document alone")


def test_what_stands_beside_the_kinds_of_rotation_is_not_read(saved: Callable[..., Path]) -> None:
    """As in the release's config.json."""
    folder = saved()
    expected = open_weights(folder).config
    written = json.loads((folder / "config.json").read_text())["rope_parameters"]
    edit_config(folder, rope_parameters=written | {"original_max_position_embeddings": 4096})
    assert open_weights(folder).config == expected


def test_an_explicit_attention_factor_is_the_only_one(saved: Callable[..., Path]) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 32.0, "original_max_position_embeddings": 4096}

    def magnitude(**explicit: float) -> float:
        folder = saved(rope_parameters={FULL: yarn | explicit, SLIDING: {"rope_type": "default", "rope_theta": 1e4}})
        (first, *_) = open_weights(folder).config.layers
        factor: float = first.of[0].attention["rope"]["yarn"]["magnitude"]
        return factor

    assert magnitude(attention_factor=1.0) == 1.0
    assert magnitude() == pytest.approx(1.34657, abs=1e-5)


def test_a_gate_is_known_by_its_shape(saved: Callable[..., Path]) -> None:
    """Where `true` meant a gate for each element, the file says so, and is read once its configuration does too."""
    folder = saved(gating="per-element")
    expected = logits_of(folder)
    edit_config(folder, gating=True)
    with pytest.raises(Refused, match=r"g_proj\.weight of shape \[16, 8\]"):
        load_model(folder)
    edit_config(folder, gating="per-element")
    assert torch.equal(logits_of(folder), expected)


@pytest.mark.parametrize("head_dim", [6, 8, 14, 98, 128])
def test_every_share_of_a_head_comes_back(head_dim: int, tmp_path: Path) -> None:
    """Transformers rounds factor × head_dim down."""
    for rotated in range(2, head_dim + 1, 2):
        config = of_layers({**ATTENTION, "head_dim": head_dim, "rope_dim": None if rotated == head_dim else rotated})
        export_model(tmp_path / f"{rotated}", saved_ours(config, tmp_path / f"ours {rotated}"))
        assert open_weights(tmp_path / f"{rotated}").config.layers[0].of[0].attention["rope_dim"] == (
            None if rotated == head_dim else rotated
        )


ATTENTION: dict[str, Any] = {
    "scheme": "gqa",
    "heads": 2,
    "kv_heads": 1,
    "head_dim": 4,
    "qk_norm": True,
    "gate": "head",
}


def of_layers(*attentions: dict[str, Any]) -> ModelConfig:
    layers = [{"attention": attention, "feedforward": {"scheme": "dense", "hidden": 8}} for attention in attentions]
    return build(ModelConfig, {"vocab": 9, "width": 8, "layers": [{"of": layers}]}, "model")


def saved_ours(config: ModelConfig, folder: Path) -> Any:
    model = Model(config)
    model.initialise(0)
    save_model(folder, config, model.state_dict())
    return open_weights(folder)


@pytest.mark.parametrize(
    ("attentions", "reason"),
    [
        pytest.param([ATTENTION | {"gate": None, "rope_dim": 2}], "gate is None", id="no gate"),
        pytest.param([ATTENTION, ATTENTION | {"gate": "element"}], "gate is element", id="gates of two kinds"),
        pytest.param([ATTENTION | {"window": w} for w in (3, 5)], "window is 5", id="two windows"),
        pytest.param([ATTENTION, ATTENTION | {"rope_dim": 2}], "rope_dim is 2", id="two rotations of one kind"),
        pytest.param([ATTENTION | {"value_norm": True}], "value_norm is True", id="a norm of values"),
    ],
)
def test_what_laguna_cannot_hold_is_not_exported(attentions: list[dict[str, Any]], reason: str, tmp_path: Path) -> None:
    weights = saved_ours(of_layers(*attentions), tmp_path / "ours")
    with pytest.raises(Refused, match=rf"laguna: [^;]*{reason}"):
        export_model(tmp_path / "hf", weights)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        pytest.param({"gating": False}, "gating", id="gating that is off"),
        pytest.param({"gating": "per-token"}, "gating", id="another gate"),
        pytest.param({"moe_router_logit_softcapping": 30.0}, "softcapping", id="capped router logits"),
        pytest.param({"moe_apply_router_weight_on_input": True}, "weight_on_input", id="weights before experts"),
        pytest.param({"num_attention_heads_per_layer": [2, 4]}, "num_attention_heads_per_layer", id="too few heads"),
        pytest.param({"num_attention_heads_per_layer": [2, 3, 4]}, "multiple of kv_heads", id="odd heads"),
        pytest.param({"layer_types": [FULL, SLIDING, "chunked"]}, "layer_types", id="another kind of layer"),
        pytest.param({"mlp_layer_types": ["dense"]}, "mlp_layer_types", id="too few feed-forwards"),
        pytest.param({"rope_parameters": {FULL: {"rope_theta": 1e4}}}, SLIDING, id="no rotation for a kind"),
        pytest.param(
            {"rope_parameters": {kind: {"rope_type": "yarn", "truncate": False} for kind in (FULL, SLIDING)}},
            "truncate must stand beside",
            id="an exact ramp that Transformers would round",
        ),
        pytest.param(
            {"rope_parameters": {kind: {"partial_rotary_factor": 0.4} for kind in (FULL, SLIDING)}},
            "rope_dim",
            id="an odd share of a head",
        ),
        *(
            pytest.param(
                {"rope_parameters": {kind: {"partial_rotary_factor": share} for kind in (FULL, SLIDING)}},
                "partial_rotary_factor",
                id=f"a share that is {share}",
            )
            for share in ("half", None, 2.0)
        ),
        pytest.param({"gating": ["per-head"]}, "gating", id="a list of gates"),
    ],
)
def test_what_cannot_be_represented_is_refused(change: dict[str, Any], named: str, saved: Callable[..., Path]) -> None:
    folder = saved()
    edit_config(folder, **change)
    with pytest.raises(Refused, match=named):
        open_weights(folder)


def test_a_selection_bias_is_needed(saved: Callable[..., Path]) -> None:
    folder, name = saved(), "model.layers.1.mlp.experts.e_score_correction_bias"
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(Refused, match=f"lacks the tensor {name}"):
        load_model(folder)
