"""Gemma 4: equal to Transformers' own, the buffers that it holds and we train included; shared keys and values learn from
every reader, and the dead ones of released files are not read."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma4Config, Gemma4ForConditionalGeneration

from conf.schema import Refused
from models.sequence import Whole
from models.shards import Shards
from models.weights import export_model, load_model, open_weights
from tests.test_families import SEEDS, assert_equal, assert_near, edit_config, edit_tensors, loaded, reference

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
        "head_dim": draw.choice([2, 4, 8]),
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
    return shared(draw) | {"hidden_size_per_layer_input": draw.randint(2, 6)}


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
