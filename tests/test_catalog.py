"""The models that ship are the released ones: their configurations, and the sizes that their authors publish."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from conf.schema import Refused, build
from models import catalog, cost
from models.config import ModelConfig
from models.families.common import plan, published

# Each as released on its model page: the keys that decide the model.
RELEASED: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "routed_scaling_factor": 2.5,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "moe_layer_freq": 1,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 1,
        "hidden_act": "silu",
        "max_position_embeddings": 163840,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
    },
    "deepseek_v32": {
        "model_type": "deepseek_v32",
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "routed_scaling_factor": 2.5,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "index_head_dim": 128,
        "index_n_heads": 64,
        "index_topk": 2048,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 1,
        "max_position_embeddings": 163840,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "tie_word_embeddings": False,
    },
    "glm5_1": {
        "model_type": "glm_moe_dsa",
        "vocab_size": 154880,
        "hidden_size": 6144,
        "intermediate_size": 12288,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 78,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "routed_scaling_factor": 2.5,
        "kv_lora_rank": 512,
        "q_lora_rank": 2048,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 192,
        "v_head_dim": 256,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "index_head_dim": 128,
        "index_n_heads": 32,
        "index_topk": 2048,
        "indexer_rope_interleave": True,
        "num_nextn_predict_layers": 1,
        "max_position_embeddings": 202752,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
        "tie_word_embeddings": False,
    },
    "mixtral_8x7b": {
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "router_aux_loss_coef": 0.02,
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
    },
    "qwen3_30b_a3b": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": None,
        "use_sliding_window": False,
        "sliding_window": None,
        "attention_bias": False,
        "tie_word_embeddings": False,
    },
}


def shipped(name: str) -> ModelConfig:
    return build(ModelConfig, catalog.section(name, {}), name)


@pytest.mark.parametrize("name", RELEASED)
def test_shipped_models_are_the_released_ones(name: str) -> None:
    family = published.family(RELEASED[name]["model_type"], "")
    released = family.config_from(RELEASED[name])
    assert not plan.difference(shipped(name), replace(released, std=shipped(name).std))


@pytest.mark.parametrize(
    "name", ["deepseek_v3", "deepseek_v32", "glm5_1", "kimi_k2_6", "mixtral_8x7b", "qwen3_30b_a3b"]
)
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
    ("name", "total", "active"),
    [
        pytest.param("deepseek_v3", 671.026, 36.6, id="deepseek_v3"),
        pytest.param("deepseek_v32", 671.878, 37.5, id="deepseek_v32"),
        pytest.param("glm5_1", 743.911, 40.8, id="glm5_1"),
        pytest.param("kimi_k2_6", 1026.408, 31.7, id="kimi_k2_6"),
        # both releases count the embedding's rows among the active parameters (12.9 and 3.3); we do not
        pytest.param("mixtral_8x7b", 46.7, 12.9 - 0.131, id="mixtral_8x7b"),
        pytest.param("qwen3_30b_a3b", 30.5, 3.35 - 0.311, id="qwen3_30b_a3b"),
    ],
)
def test_published_sizes_in_billions(name: str, total: float, active: float) -> None:
    size = cost.parameters(cost.meta(shipped(name)))
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
    first, last = (cost.meta(shipped(name)).blocks[i] for i in (0, -1))

    def size(block: nn.Module, part: str) -> float:
        return sum(parameter.numel() for parameter in block.get_submodule(part).parameters()) / 1e6

    assert size(first, "attention.attention") == pytest.approx(attention, abs=1e-3)
    assert size(first, "feedforward.feedforward") == pytest.approx(dense, abs=5e-4)
    assert size(last, "feedforward.feedforward.shared") == pytest.approx(expert, abs=5e-4)
    assert size(last, "feedforward.feedforward.router") == pytest.approx(router, abs=5e-4)
