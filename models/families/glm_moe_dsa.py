"""GLM-5 and GLM-5.1 (arXiv 2602.15763): sparse attention as in DeepSeek-V3.2; its indexer rotates pairs (2i, 2i + 1).

Layers that share another layer's indices (GLM-5.2) are refused. Transformers trains no indexer; see deepseek_v32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.config import ModelConfig
from models.families.common import sparse

FIXED: Mapping[str, Any] = {"indexer_rope_interleave": True}


@dataclass(frozen=True)
class Published(sparse.Published):
    """config.json, with the defaults of Transformers' GlmMoeDsaConfig."""

    vocab_size: int = 154_880
    hidden_size: int = 6144
    intermediate_size: int = 12_288
    num_hidden_layers: int = 78
    num_attention_heads: int = 64
    q_lora_rank: int | None = 2048
    v_head_dim: int = 256
    qk_nope_head_dim: int = 192
    max_position_embeddings: int = 202_752
    rms_norm_eps: float = 1e-5
    index_n_heads: int = 32


def config_from(hf: Mapping[str, Any]) -> ModelConfig:
    """config.json to ours. Raises Refused for what cannot be represented."""
    return sparse.config_from(hf, Published, FIXED, "interleaved")


def config_to(config: ModelConfig) -> dict[str, Any]:
    """Ours to config.json. Raises Refused where GLM-5 cannot hold the model."""
    return sparse.config_to(config, config_from, "GlmMoeDsaForCausalLM", "glm_moe_dsa")


tensor_names = sparse.tensor_names
