"""Gemma 4: equal to Transformers' own, the buffers that it holds and we train included; shared keys and values learn
from every reader, and the dead ones of released files are not read."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma4Config, Gemma4ForConditionalGeneration

from conf.schema import Refused, build
from models.config import ModelConfig
from models.model import Losses, Model
from models.sequence import Whole
from models.weights import export_model, load_model, open_weights, save_model
from parallel.recompute import recompute
from tests.test_families import SEEDS, assert_equal, assert_near, edit_config, edit_tensors, reference

TOLERANCE = 1e-4

FLOOR = 1e-2
"""The last layer's scalar stands before a norm, so that its gradient is what is left of terms that cancel."""

SLIDING, FULL = "sliding_attention", "full_attention"


def common(draw: random.Random) -> dict[str, Any]:
    heads, layers, vocab = draw.choice([2, 4]), draw.randint(2, 5), draw.randint(5, 40)
    head_counts = [n for n in (1, 2, 4) if heads % n == 0]
    return {
        "vocab_size": vocab,
        "vocab_size_per_layer_input": vocab,
        "hidden_size": draw.randint(5, 20),
        "intermediate_size": draw.randint(4, 24),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice(head_counts),
        "num_global_key_value_heads": draw.choice([None, *head_counts]),
        "head_dim": draw.choice([4, 6, 8]),
        "global_head_dim": draw.choice([4, 6, 8, 12]),
        "attention_bias": draw.random() < 0.2,
        "layer_types": [*(draw.choice([SLIDING, SLIDING, FULL]) for _ in range(layers - 1)), FULL],
        "sliding_window": draw.choice([1, 3, 7]),
        "rope_parameters": {
            SLIDING: {"rope_type": "default", "rope_theta": draw.choice([100.0, 1e4])},
            FULL: {
                "rope_type": "proportional",
                "rope_theta": draw.choice([100.0, 1e6]),
                "partial_rotary_factor": draw.choice([0.0, 0.25, 0.5, 1.0]),
            },
        },
        "final_logit_softcapping": draw.choice([None, 3.0, 30.0]),
        "tie_word_embeddings": draw.random() < 0.8,
        "rms_norm_eps": draw.choice([1e-6, 1e-5, 1e-2]),
        "hidden_size_per_layer_input": 0,
        "max_position_embeddings": 64,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def shared(draw: random.Random) -> dict[str, Any]:
    """A tail that reads others' keys and values: one donor at least for each kind of layer."""
    config = common(draw)
    kinds, first = config["layer_types"], draw.randint(1, config["num_hidden_layers"] - 1)
    kinds[:first] = [*kinds[: max(0, first - 2)], *([SLIDING, FULL] if first > 1 else [FULL])]
    if first == 1:
        kinds[1:] = [FULL] * (len(kinds) - 1)
    return config | {"num_kv_shared_layers": config["num_hidden_layers"] - first}


def e2b(draw: random.Random) -> dict[str, Any]:
    return shared(draw) | {"hidden_size_per_layer_input": draw.randint(2, 6), "use_double_wide_mlp": True}


def e4b(draw: random.Random) -> dict[str, Any]:
    return shared(draw) | {"hidden_size_per_layer_input": draw.randint(4, 8)}


def dense(draw: random.Random) -> dict[str, Any]:
    return common(draw) | {"attention_k_eq_v": True}


def experts(draw: random.Random) -> dict[str, Any]:
    number = draw.randint(2, 5)
    return {
        "enable_moe_block": True,
        "num_experts": number,
        "top_k_experts": draw.randint(2, number),
        "moe_intermediate_size": draw.randint(4, 12),
    }


def a4b(draw: random.Random) -> dict[str, Any]:
    return dense(draw) | experts(draw)


def everything(draw: random.Random) -> dict[str, Any]:
    """What no release combines."""
    return e2b(draw) | experts(draw) | {"attention_k_eq_v": draw.random() < 0.7}


KINDS = {"e2b": e2b, "e4b": e4b, "26b_a4b": a4b, "31b": dense, "everything": everything}


def gemma(**values: Any) -> Any:
    """The reference, each layer's scalar to be trained, as DeepMind's own code does."""
    model = reference("gemma4_text", **values)
    for layer in model.model.layers:
        layer.layer_scalar.requires_grad_()
    return model


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: f"seed{seed:02}")
@pytest.mark.parametrize("kind", KINDS)
def test_equals_transformers(kind: str, seed: int, tmp_path: Path) -> None:
    draw = random.Random(f"{kind} {seed}")
    torch.manual_seed(seed)
    assert_equal(gemma(**KINDS[kind](draw)), draw, tmp_path, TOLERANCE, FLOOR)


SIZES: dict[str, Any] = {
    "vocab_size": 11,
    "vocab_size_per_layer_input": 11,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "global_head_dim": 8,
    "layer_types": [SLIDING, FULL, SLIDING, FULL],
    "sliding_window": 3,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 4,
    "final_logit_softcapping": 3.0,
    "pad_token_id": None,
}
"""Of a small E2B: layers 2 and 3 read layers 0 and 1."""


def test_per_layer_embeddings_without_sharing(tmp_path: Path) -> None:
    alone = {"num_kv_shared_layers": 0, "use_double_wide_mlp": False}
    assert_equal(gemma(**(SIZES | alone)), random.Random(0), tmp_path, TOLERANCE, FLOOR)


IDS = torch.arange(11)[None]


def logits_of(model: Model) -> Tensor:
    logits = model(IDS, Whole.rows(1, 11))
    assert isinstance(logits, Tensor)
    return logits


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    gemma(**SIZES).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def test_dead_keys_of_released_files_change_nothing(saved: Path, tmp_path: Path) -> None:
    expected = logits_of(load_model(saved))
    dead = {
        f"model.layers.{layer}.self_attn.{name}.weight": torch.randn(shape)
        for layer, width in ((2, 4), (3, 8))
        for name, shape in (("k_proj", (width, 8)), ("v_proj", (width, 8)), ("k_norm", (width,)))
    }
    edit_tensors(saved, lambda tensors: tensors.update(dead))
    assert torch.equal(logits_of(load_model(saved)), expected)
    export_model(tmp_path / "back", open_weights(saved))
    assert not dead.keys() & set(open_weights(tmp_path / "back").tensors)
    assert torch.equal(logits_of(load_model(tmp_path / "back")), expected)


def test_living_keys_must_be_there_and_others_must_not(saved: Path) -> None:
    edit_tensors(saved, lambda t: t.update({"model.layers.1.self_attn.k_extra.weight": torch.ones(1)}))
    with pytest.raises(Refused, match="k_extra"):
        load_model(saved)
    edit_tensors(saved, lambda t: (t.pop("model.layers.1.self_attn.k_extra.weight"), t.pop(DONOR)))
    with pytest.raises(Refused, match=f"lacks the tensor {DONOR}"):
        load_model(saved)


DONOR = "model.layers.1.self_attn.k_proj.weight"


def test_a_packed_table_has_a_part_for_each_layer(saved: Path) -> None:
    name = "model.embed_tokens_per_layer.weight"
    edit_tensors(saved, lambda t: t.update({name: t[name][:, :-1].clone()}))
    with pytest.raises(Refused, match="means 4 parts of 4"):
        load_model(saved)


def test_the_language_model_of_a_multimodal_release(tmp_path: Path) -> None:
    """Under the names of the whole model; its towers are left out."""
    config = Gemma4Config(
        text_config=SIZES | {"pad_token_id": 0},
        vision_config={"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
                       "num_key_value_heads": 2, "head_dim": 4, "position_embedding_size": 16},
        audio_config=None,
    )  # fmt: skip
    theirs = Gemma4ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    theirs.save_pretrained(tmp_path / "hf")
    ours = load_model(tmp_path / "hf")
    assert_near(logits_of(ours), theirs(IDS).logits, "logits")
    weights = open_weights(tmp_path / "hf")
    assert export_model(tmp_path / "text", weights) == "gemma4_text"
    assert torch.equal(logits_of(load_model(tmp_path / "text")), logits_of(ours))


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_shared_keys_learn_from_every_reader(recomputed: bool, saved: Path) -> None:
    """Without a cache: the donor's gradient is the sum of what each reader sends, and none is lost to recompute.

    A reader whose output is closed sends nothing, so that its share is the difference.
    """
    donor = "blocks.1.attention.attention.key.weight"

    def gradient(*closed: int) -> Tensor:
        model = load_model(saved)
        if recomputed:
            recompute(model, "full")
        with torch.no_grad():
            for layer in closed:
                model.get_parameter(f"blocks.{layer}.attention.attention.output.weight").zero_()
        losses = model(IDS, Whole.rows(1, 11), IDS.roll(-1, 1))
        assert isinstance(losses, Losses)
        losses.cross_entropy.backward()
        taken = model.get_parameter(donor).grad
        assert taken is not None
        return taken

    assert gradient(1).norm() > 1e-4, "a reader sends nothing"
    assert gradient(1, 3).norm() == 0
    assert not torch.equal(gradient(), gradient(3))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        pytest.param({"hidden_activation": "relu"}, "hidden_activation", id="activation"),
        pytest.param({"use_bidirectional_attention": "all"}, "use_bidirectional_attention", id="not causal"),
        pytest.param({"num_kv_shared_layers": 3}, "leaves no full_attention", id="no donor of a kind"),
        pytest.param({"num_kv_shared_layers": 4}, "at least one layer", id="no donor at all"),
        pytest.param({"vocab_size_per_layer_input": 12}, "vocab_size_per_layer_input", id="tables of two vocabularies"),
        pytest.param({"enable_moe_block": True}, "num_experts", id="experts without a number"),
        pytest.param({"layer_types": [FULL]}, "layer_types", id="kinds of too few layers"),
        pytest.param({"per_layer_config": {"1": {"sliding_window": 2}}}, "sliding_window", id="another override"),
        pytest.param({"final_logit_softcapping": -1.0}, "logit_cap", id="a cap below zero"),
    ],
)
def test_what_cannot_be_represented_is_refused(change: dict[str, Any], named: str, saved: Path) -> None:
    edit_config(saved, **change)
    with pytest.raises(Refused, match=named):
        open_weights(saved)


def test_sizes_of_full_layers_are_read_from_either_form(saved: Path) -> None:
    """By layer, as Transformers writes them, or for all full layers, as released."""
    expected = open_weights(saved).config
    edit_config(saved, per_layer_config=None, global_head_dim=8)
    assert open_weights(saved).config == expected


def test_a_key_gain_of_a_readers_own_is_not_exported(tmp_path: Path) -> None:
    attention = {"scheme": "tied_kv", "heads": 2, "kv_heads": 1, "head_dim": 4, "scale": 1.0, "keeps": "value"}
    layer = {"attention": attention, "feedforward": {"scheme": "dense", "hidden": 8, "activation": "gelu_tanh"}}
    layers = [{"of": [layer, {**layer, "reads": 0}]}]
    scales = {"post_norm": True, "block_scale": True, "embedding_scale": 8**0.5, "tied": True}
    config = build(ModelConfig, {"vocab": 9, "width": 8, "layers": layers, **scales}, "model")
    model = Model(config)
    model.initialise(0)
    save_model(tmp_path / "ours", config, model.state_dict())
    with pytest.raises(Refused, match="key gain of its own"):
        export_model(tmp_path / "hf", open_weights(tmp_path / "ours"))
