"""The families with an indexer, against Transformers; what theirs lacks is tested on ours alone in test_dsa.py."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.schema import Refused
from models.sequence import Whole
from models.weights import load_model, open_weights
from tests.schemes import packed
from tests.test_families import SEEDS, assert_equal, assert_near, deepseek_v3, edit_config, reference

FAMILIES = ["deepseek_v32", "glm_moe_dsa"]


def drawn(draw: random.Random) -> dict[str, Any]:
    """As DeepSeek-V3, and an indexer. 16 index heads or more: with few, many scores are zero, and Transformers leaves
    to chance which of them are chosen."""
    config = deepseek_v3(draw)
    config.pop("rope_interleave")
    kinds = [draw.choice(["dense", "sparse"]) for _ in range(config["num_hidden_layers"])]
    return config | {
        "q_lora_rank": draw.randint(4, 12),
        "mlp_layer_types": draw.choice([None, kinds]),
        "index_n_heads": draw.randint(16, 20),
        "index_head_dim": config["qk_rope_head_dim"] + draw.choice([0, 3, 8]),
        "index_topk": draw.choice([1, 2, 5, 11, 64]),
    }


def sizes(**values: Any) -> dict[str, Any]:
    return drawn(random.Random("sizes")) | {"vocab_size": 19, "num_hidden_layers": 2, "mlp_layer_types": None} | values


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: f"seed{seed:02}")
@pytest.mark.parametrize("model_type", FAMILIES)
def test_equals_transformers(model_type: str, seed: int, tmp_path: Path) -> None:
    draw = random.Random(f"{model_type} {seed}")
    torch.manual_seed(seed)
    assert_equal(reference(model_type, **drawn(draw)), draw, tmp_path)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("model_type", FAMILIES)
def test_packed_documents_as_transformers_reads_restarted_positions(model_type: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    theirs = reference(model_type, **sizes(index_topk=3))
    theirs.save_pretrained(tmp_path)
    sequence, ids = packed([[7, 1, 9]]), torch.randint(19, (1, 17))
    logits = load_model(tmp_path)(ids, sequence)
    assert isinstance(logits, torch.Tensor)
    assert_near(logits, theirs(ids, position_ids=sequence.position, use_cache=False).logits, "logits")
    alone = load_model(tmp_path)(ids[:, 8:], Whole.rows(1, 9))
    assert isinstance(alone, torch.Tensor)
    assert_near(logits[:, 8:], alone, "the last document")


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    ("model_type", "change", "named"),
    [
        pytest.param("deepseek_v32", {"layer_types": ["full_attention"] * 2}, "layer_types", id="full attention"),
        pytest.param("deepseek_v32", {"q_lora_rank": None}, "q_lora_rank", id="no query latent"),
        pytest.param("deepseek_v32", {"mlp_layer_types": ["dense"]}, "mlp_layer_types", id="too few kinds"),
        pytest.param("deepseek_v32", {"index_topk": 0}, "top_k", id="top-k over nothing"),
        pytest.param("glm_moe_dsa", {"indexer_types": ["full", "shared"]}, "indexer_types", id="shared indices"),
        pytest.param("glm_moe_dsa", {"indexer_rope_interleave": False}, "indexer_rope", id="the other pairing"),
    ],
)
def test_what_cannot_be_represented_is_refused(
    model_type: str, change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    reference(model_type, **sizes()).save_pretrained(tmp_path)
    edit_config(tmp_path, **change)
    with pytest.raises(Refused, match=named):
        open_weights(tmp_path)
