"""GPT-2 against Transformers' own implementation; learned positions in packed rows, in decode, and where they end."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conf.schema import Refused, build
from models import catalog, cost, decode
from models.config import ModelConfig
from models.model import Model
from models.sequence import Whole
from models.weights import export_model, load_model, open_weights, save_model
from tests.schemes import packed
from tests.test_families import SEEDS, assert_equal, assert_near, edit_config, reference

FLOOR = 1e-2
"""A bias of all keys moves no softmax: its gradient is what rounding leaves of nothing."""


def drawn(draw: random.Random, **values: Any) -> dict[str, Any]:
    heads = draw.choice([1, 2, 3, 4])
    return {
        "vocab_size": draw.randint(5, 40),
        "n_positions": draw.choice([24, 30, 64]),
        "n_embd": heads * draw.choice([5, 6, 8]),
        "n_layer": draw.randint(1, 3),
        "n_head": heads,
        "n_inner": draw.choice([None, draw.randint(4, 24)]),
        "activation_function": draw.choice(["gelu_new", "gelu_pytorch_tanh", "gelu", "silu"]),
        "layer_norm_epsilon": draw.choice([1e-6, 1e-5, 1e-2]),
        "scale_attn_weights": draw.random() < 0.7,
        "scale_attn_by_inverse_layer_idx": draw.random() < 0.4,
        "reorder_and_upcast_attn": draw.random() < 0.3,
        "tie_word_embeddings": draw.random() < 0.6,
        "bos_token_id": None,
        "eos_token_id": None,
        **values,
    }


def sizes(**values: Any) -> dict[str, Any]:
    fixed = {"vocab_size": 11, "n_positions": 24, "n_embd": 8, "n_head": 2, "n_layer": 2, "n_inner": None}
    return drawn(random.Random("sizes"), **(fixed | values))


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: f"seed{seed:02}")
def test_equals_transformers(seed: int, tmp_path: Path) -> None:
    draw = random.Random(f"gpt2 {seed}")
    torch.manual_seed(seed)
    assert_equal(reference("gpt2", **drawn(draw)), draw, tmp_path, floor=FLOOR)


def test_the_first_release_is_read_too(tmp_path: Path) -> None:
    """Names without a prefix, and each layer's mask beside its weights."""
    reference("gpt2", **sizes(tie_word_embeddings=True)).save_pretrained(tmp_path)
    exact = open_weights(tmp_path)
    held = {name: exact.tensors[name] for name in exact.tensors}
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(tmp_path / "model.safetensors").items()}
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 24, 24).tril() for layer in range(2)}
    save_file(tensors | masks, tmp_path / "model.safetensors")
    assert all(torch.equal(open_weights(tmp_path).tensors[name], tensor) for name, tensor in held.items())


def test_packed_documents_as_transformers_reads_restarted_positions(tmp_path: Path) -> None:
    """And token by token through the cache."""
    theirs = reference("gpt2", **sizes())
    theirs.save_pretrained(tmp_path)
    ours, sequence, ids = load_model(tmp_path), packed([[7, 1, 9]]), torch.randint(11, (1, 17))
    logits = ours(ids, sequence)
    assert isinstance(logits, Tensor)
    assert_near(logits, theirs(ids, position_ids=sequence.position, use_cache=False).logits, "logits")
    assert_near(decode.score(ours, ids[:, 8:])[0], logits[:, 8:].detach(), "logits through the cache")


def test_a_row_longer_than_the_table_is_refused(tmp_path: Path) -> None:
    reference("gpt2", **sizes()).save_pretrained(tmp_path)
    model, ids = load_model(tmp_path), torch.zeros(1, 25, dtype=torch.int64)
    model(ids[:, :24], Whole.rows(1, 24))
    said = "learned positions for 24 tokens, but 25 are given"
    with pytest.raises(Refused, match=said):
        model(ids, Whole.rows(1, 25))
    with pytest.raises(Refused, match=said):
        decode.score(model, ids)
    with pytest.raises(Refused, match=said):
        next(decode.generate(model, ids[0, :20], 5))
    assert len(list(decode.generate(model, ids[0, :20], 4))) == 4


@pytest.mark.parametrize(
    ("change", "named"),
    [
        pytest.param({"activation_function": "relu"}, "activation_function", id="activation"),
        pytest.param({"add_cross_attention": True}, "add_cross_attention", id="cross-attention"),
        pytest.param({"n_head": 3}, "n_head", id="heads that do not divide"),
        pytest.param({"n_positions": 0}, "positions", id="no positions"),
        pytest.param({"n_inner": 0}, "hidden", id="no feed-forward"),
        pytest.param({"n_positions": 25}, "wpe.weight of shape", id="another table"),
        pytest.param({"n_inner": 7}, "c_fc.weight of shape", id="another feed-forward"),
    ],
)
def test_what_cannot_be_represented_is_refused(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    reference("gpt2", **sizes()).save_pretrained(tmp_path)
    edit_config(tmp_path, **change)
    with pytest.raises(Refused, match=named):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param({"positions": None}, "gpt2: it has no learned positions", id="no positions"),
        pytest.param({"norm": "rms"}, "gpt2: norm is rms, not layer", id="another norm"),
    ],
)
def test_what_it_cannot_hold_is_not_exported(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    config = build(ModelConfig, {**catalog.section("gpt2_tiny", {}), "vocab": 9, **change}, "model")
    model = Model(config)
    model.initialise(0)
    save_model(tmp_path / "ours", config, model.state_dict())
    with pytest.raises(Refused, match=reason):
        export_model(tmp_path / "hf", open_weights(tmp_path / "ours"))


def test_published_size() -> None:
    model = cost.meta(build(ModelConfig, catalog.section("gpt2", {}), "gpt2"))
    size = cost.parameters(model)
    assert size.total == 124_439_808
    assert size.looked_up == 1024 * 768
    assert cost.parameters_by_part(model)["positions"] == 1024 * 768
    assert cost.longest_context(model, 80e9) == 1024
