"""What the models with DeepSeek sparse attention have in common, besides what they have from DeepSeek-V3."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from models.config import ModelConfig
from models.families.common import deepseek, names, plan, published

SCHEMES = {"attention": ["dsa"], "feedforward": ["dense", "moe"]}

FIXED: Mapping[str, Any] = {**deepseek.FIXED, "mlp_bias": False, "rope_interleave": True, "index_topk_freq": 1}

INDEXER = {
    "index_query.query.weight": "indexer.wq_b.weight",
    "index_query.weight.weight": "indexer.weights_proj.weight",
    "index_key.weight": "indexer.wk.weight",
    "index_norm.gain": "indexer.k_norm.weight",
    "index_norm.bias": "indexer.k_norm.bias",
}


@dataclass(frozen=True)
class Published(deepseek.Published):
    """config.json, with the defaults of Transformers' DeepseekV32Config."""

    max_position_embeddings: int = 163_840
    n_group: int = 1
    topk_group: int = 1
    index_topk: int = 2048
    index_head_dim: int = 128
    index_n_heads: int = 64
    layer_types: list[str] | None = None
    indexer_types: list[str] | None = None
    # what a layer without an indexer of its own would read, which none here is
    index_topk_pattern: str | None = None
    index_skip_topk_offset: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.q_lora_rank is None:
            raise ValueError("q_lora_rank must be given: the indexer's queries are made from that latent")
        if set(self.layer_types or ()) - {"indexed_attention"}:
            raise ValueError("layer_types must be indexed_attention in every layer")
        if set(self.indexer_types or self.index_topk_pattern or ()) - {"full", "F"}:
            raise ValueError("indexer_types must be full in every layer: no indices are shared between layers here")


def config_from(hf: Mapping[str, Any], owner: type[Published], fixed: Mapping[str, Any], pairing: str) -> ModelConfig:
    """config.json to ours. pairing: of the indexer's rotation. Raises Refused for what cannot be represented."""
    p = published.read(owner, hf, {**FIXED, **fixed})
    indexer = {"heads": p.index_n_heads, "head_dim": p.index_head_dim, "top_k": p.index_topk, "pairing": pairing}
    return deepseek.config_from(p, scheme="dsa", indexer=indexer)


def config_to(
    config: ModelConfig, reading: Callable[[Mapping[str, Any]], ModelConfig], architecture: str, model_type: str
) -> dict[str, Any]:
    """Ours to config.json. Raises Refused where the family cannot hold the model."""
    depths = plan.layers(config, SCHEMES)
    indexer = depths[0].attention.indexer
    own = {
        "architectures": [architecture],
        "model_type": model_type,
        "mlp_layer_types": deepseek.kinds(depths),
        "index_n_heads": indexer.heads,
        "index_head_dim": indexer.head_dim,
        "index_topk": indexer.top_k,
    }
    return deepseek.config_to(config, depths, reading, **own)


def tensor_names(config: ModelConfig) -> names.Names:
    """Our tensors' names to Transformers'."""
    return deepseek.tensor_names(config, plan.layers(config, SCHEMES), INDEXER)
