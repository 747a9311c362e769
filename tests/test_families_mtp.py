"""Multi-token prediction of published checkpoints: imported, exported as it was, and no matter to Transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conf.schema import Refused, build
from models.config import ModelConfig
from models.model import Model
from models.sequence import Whole
from models.shards import Shards
from models.weights import export_model, load_model, open_weights, save_model
from tests import draw_v4
from tests.test_families import ATTENTION, EXPERTS, assert_near, edit_config, loaded, reference, tiny
from tests.test_families_sparse import sizes

# by hand, from the releases: the tensors of one module beside those of a layer
CONCAT = ["enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"]
COPIES = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
STREAMS = ["enorm.weight", "hnorm.weight", "e_proj.weight", "h_proj.weight", "norm.weight"]
HEAD_MIX = {"hc_head_fn": (2, 16), "hc_head_base": (2,), "hc_head_scale": (1,)}
OF_A_RELEASE = {"attn.norm.weight": "attn.kv_norm.weight"}


def drawn(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape)


def as_released(model_type: str, folder: Path, modules: int, tied: bool = False) -> dict[str, Tensor]:
    """A checkpoint with multi-token prediction, put together from one without; returns what it adds."""
    torch.manual_seed(3)
    changes = {"num_nextn_predict_layers": modules, "tie_word_embeddings": tied}
    if model_type == "deepseek_v4":
        small = {"vocab_size": 11, "hidden_size": 8, "num_attention_heads": 2, "num_experts_per_tok": 2}
        theirs = reference(model_type, **(small | draw_v4.TINY | changes))
    elif model_type == "deepseek_v3":
        theirs = tiny(model_type, **changes)
    else:
        theirs = reference(model_type, **sizes(hidden_size=8, first_k_dense_replace=1, **changes))
    theirs.save_pretrained(folder)
    edit_config(folder, num_nextn_predict_layers=modules)
    tensors = load_file(folder / "model.safetensors")
    added: dict[str, Tensor] = {}
    for index in range(modules):
        last = theirs.config.num_hidden_layers
        if model_type == "deepseek_v4":
            # its windowed layer has a router by table: the learned one's tensors are those of the next layer
            prefix, names = (
                f"mtp.{index}.",
                [name for name in tensors if ".layers.0." in name and "tid2eid" not in name],
            )
            for name in names:
                inside = name.split(".layers.0.")[1]
                added[prefix + OF_A_RELEASE.get(inside, inside)] = drawn(tensors[name].shape)
            added[f"{prefix}ffn.gate.bias"] = drawn((4,))
            shapes = {name: (8, 8) if "proj" in name else (8,) for name in STREAMS} | HEAD_MIX
        else:
            prefix = f"model.layers.{last + index}."
            for name in [name for name in tensors if f".layers.{last - 1}." in name]:
                added[prefix + name.split(f".layers.{last - 1}.")[1]] = drawn(tensors[name].shape)
            shapes = {name: (8, 16) if "eh_proj" in name else (8,) for name in CONCAT}
            for name, whole in COPIES.items():
                added[prefix + name] = tensors[COPIES["embed_tokens.weight"] if tied else whole].clone()
        added |= {prefix + name: drawn(shape) for name, shape in shapes.items()}
    save_file(tensors | added, folder / "model.safetensors", metadata={"format": "pt"})
    return added


FAMILIES = ["deepseek_v3", "deepseek_v32", "glm_moe_dsa", "deepseek_v4"]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    ("model_type", "modules", "tied"),
    [pytest.param(name, 1, False, id=name) for name in FAMILIES]
    + [pytest.param("deepseek_v3", 2, True, id="two modules, tied"), pytest.param("deepseek_v4", 2, False, id="two")],
)
def test_survives_import_and_export(model_type: str, modules: int, tied: bool, tmp_path: Path) -> None:
    added = as_released(model_type, tmp_path / "hf", modules, tied)
    imported = open_weights(tmp_path / "hf")
    model = Model(imported.config)
    model.load_state_dict(dict(imported.tensors))
    assert len(model.mtp) == model.mtp_depth == modules
    save_model(tmp_path / "ours", imported.config, imported.tensors)
    assert export_model(tmp_path / "back", open_weights(tmp_path / "ours")) == model_type
    before, after = Shards(tmp_path / "hf"), Shards(tmp_path / "back")
    assert set(after) == {name for name in before if before[name].numel()} and added
    assert all(torch.equal(before[name], after[name]) for name in after)
    ids = torch.arange(9)[None] % 11
    expected = loaded(tmp_path / "hf")(ids).logits
    for folder in ("hf", "back"):
        ours = load_model(tmp_path / folder)
        assert not ours.mtp
        logits = ours(ids, Whole.rows(1, 9))
        assert isinstance(logits, Tensor)
        assert_near(logits, expected, "logits", 1e-4)
    assert torch.equal(loaded(tmp_path / "back")(ids).logits, expected)


def change(folder: Path, **values: Any) -> None:
    """Replace tensors; None removes one."""
    tensors = load_file(folder / "model.safetensors") | values
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors")


def test_what_is_not_whole_is_refused(tmp_path: Path) -> None:
    """A module half there, or a copy that is none; where nothing is there, config.json alone speaks of it."""
    added = as_released("deepseek_v3", tmp_path, 1)
    copies = [name for name in added if name.endswith(tuple(COPIES))]
    change(tmp_path, **dict.fromkeys(copies))
    assert open_weights(tmp_path).config.mtp is not None, "copies may be left out"
    change(tmp_path, **{copies[0]: added[copies[0]] + 1})
    with pytest.raises(Refused, match="differs from"):
        open_weights(tmp_path)
    change(tmp_path, **dict.fromkeys(copies), **{"model.layers.2.eh_proj.weight": None})
    with pytest.raises(Refused, match=r"lacks the tensor model\.layers\.2\.eh_proj"):
        open_weights(tmp_path)
    change(tmp_path, **dict.fromkeys(added))
    assert open_weights(tmp_path).config.mtp is None


def test_a_family_without_it_is_told(tmp_path: Path) -> None:
    layer = {"attention": ATTENTION, "feedforward": EXPERTS}
    further = {"scheme": "concat", "layer": layer}
    config = build(ModelConfig, {"vocab": 9, "width": 8, "layers": [{"of": [layer]}], "mtp": further}, "model")
    model = Model(config)
    model.initialise(0)
    save_model(tmp_path / "ours", config, model.state_dict())
    with pytest.raises(Refused, match="mixtral: mtp is set, not None"):
        export_model(tmp_path / "hf", open_weights(tmp_path / "ours"))
