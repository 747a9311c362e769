"""Kimi K2.6 as released, a multimodal model, against Transformers' own: its text tower is a DeepSeek-V3."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Kimi_K25Config, Kimi_K25ForConditionalGeneration

from conf.schema import Refused
from models.sequence import Whole
from models.shards import Shards
from models.weights import export_model, load_model, open_weights
from tests.test_families import SEEDS, assert_near, assert_same_gradients, deepseek_v3, edit_config, loaded
from tests.test_families_stored import INT4, in_int4

FILE = "model.safetensors"

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")

TOWER: dict[str, Any] = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 2,
    "pos_emb_height": 2,
    "pos_emb_width": 2,
}

TOKENS: dict[str, Any] = dict.fromkeys(
    ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"), 0
)


def reference(tied: bool = False, **text: Any) -> Any:
    """Transformers' model, every parameter and stored buffer of it perturbed."""
    sizes: dict[str, Any] = {"text_config": text, "vision_config": TOWER, "projection_hidden_size": 8}
    config = Kimi_K25Config(**sizes, **TOKENS, tie_word_embeddings=tied)
    model = Kimi_K25ForConditionalGeneration._from_config(config, attn_implementation="eager")
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for tensor in model.state_dict(keep_vars=True).values():
            tensor.add_(torch.randn_like(tensor), alpha=0.3)
    return model.eval()


def text_of(folder: Path) -> dict[str, Any]:
    text: dict[str, Any] = json.loads((folder / "config.json").read_text())["text_config"]
    return text


def as_released(folder: Path) -> dict[str, Tensor]:
    """Transformers takes the tower's word for a layer back to the language model too; releases do not. Returns the
    tensors of the language model, without what stands before their names."""
    written = load_file(folder / FILE)
    released = {
        name.replace("language_model.model.blocks.", "language_model.model.layers."): t for name, t in written.items()
    }
    save_file(released, folder / FILE, metadata={"format": "pt"})
    edit_config(folder, text_config=text_of(folder) | {"model_type": "kimi_k2"})
    start = "language_model."
    return {name.removeprefix(start): tensor for name, tensor in released.items() if name.startswith(start)}


def drawn(draw: random.Random) -> dict[str, Any]:
    """With a query latent: of a plain query matrix Transformers thinks that it is the tower's."""
    return deepseek_v3(draw) | {"q_lora_rank": draw.randint(4, 12)}


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: f"seed{seed:02}")
def test_equals_transformers(seed: int, tmp_path: Path) -> None:
    """As Transformers writes it and as it is released; its export is a DeepSeek-V3 of the same tensors."""
    draw = random.Random(f"kimi_k25 {seed}")
    torch.manual_seed(seed)
    text = drawn(draw)
    theirs = reference(text.pop("tie_word_embeddings"), model_type="deepseek_v3", **text)
    theirs.save_pretrained(tmp_path / "hf")
    ids = torch.randint(text["vocab_size"], (draw.randint(1, 2), draw.choice([1, 2, 5, 13, 24])))
    expected = theirs(ids).logits
    assert_near(score(tmp_path / "hf", ids), expected, "logits as Transformers writes it")
    tensors = as_released(tmp_path / "hf")
    ours = load_model(tmp_path / "hf")
    logits = ours(ids, Whole.rows(*ids.shape))
    assert isinstance(logits, Tensor)
    assert_near(logits, expected, "logits")

    assert export_model(tmp_path / "back", open_weights(tmp_path / "hf")) == "deepseek_v3"
    after = Shards(tmp_path / "back")
    assert set(after) == {name for name, tensor in tensors.items() if tensor.numel()}
    assert all(torch.equal(tensors[name], after[name]) for name in after)
    back = loaded(tmp_path / "back")
    again = back(ids).logits
    assert_near(again, expected, "logits of the export")
    projection = torch.randn_like(expected)
    (logits * projection).sum().backward()
    (again * projection).sum().backward()
    assert_same_gradients(ours, back)


@torch.no_grad()
def score(folder: Path, ids: Tensor) -> Tensor:
    logits = load_model(folder)(ids, Whole.rows(*ids.shape))
    assert isinstance(logits, Tensor)
    return logits


SIZES = drawn(random.Random("sizes")) | {
    "hidden_size": 16,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 0,
}


def test_experts_in_int4(tmp_path: Path) -> None:
    """As released: how they are stored stands in the language model's part of config.json."""
    reference(model_type="deepseek_v3", **SIZES).save_pretrained(tmp_path)
    as_released(tmp_path)
    exact = open_weights(tmp_path)
    held = {name: exact.tensors[name] for name in exact.tensors}
    save_file(in_int4({name: tensor.clone() for name, tensor in load_file(tmp_path / FILE).items()}), tmp_path / FILE)
    edit_config(tmp_path, text_config=text_of(tmp_path) | {"quantization_config": INT4})
    read = open_weights(tmp_path)
    assert set(read.tensors) == set(held)
    near = {name for name, tensor in held.items() if not torch.equal(read.tensors[name], tensor)}
    assert near == {name for name in held if ".experts." in name}
    assert all((read.tensors[name] - held[name]).norm() <= held[name].norm() / 13 for name in near)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        pytest.param({"text_config": None}, "text_config", id="no language model"),
        pytest.param({"text_config": SIZES | {"hidden_act": "gelu"}}, "hidden_act", id="another activation"),
    ],
)
def test_what_cannot_be_read_is_refused(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    reference(model_type="deepseek_v3", **SIZES).save_pretrained(tmp_path)
    edit_config(tmp_path, **change)
    with pytest.raises(Refused, match=named):
        open_weights(tmp_path)
