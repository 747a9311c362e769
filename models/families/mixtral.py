"""Mixtral (arXiv 2401.04088): grouped-query attention, in every layer softmax-routed experts.

Where `sliding_window` is set, every layer reads that many tokens, the query's own included, as in Transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.config import ModelConfig
from models.families.common import names, plan, published, rope

SCHEMES = {"attention": ["gqa"], "feedforward": ["moe"]}
FIXED = {"router_jitter_noise": 0.0}


@dataclass(frozen=True)
class Published:
    """config.json, with the defaults of Transformers' MixtralConfig."""

    vocab_size: int = 32_000
    hidden_size: int = 4096
    intermediate_size: int = 14_336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    head_dim: int | None = None
    max_position_embeddings: int = 131_072
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    num_experts_per_tok: int = 2
    num_local_experts: int = 8
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_theta: float = 1_000_000.0

    def __post_init__(self) -> None:
        if self.num_attention_heads < 1:
            raise ValueError("num_attention_heads must be at least 1")


def config_from(hf: Mapping[str, Any]) -> ModelConfig:
    """config.json to ours. Raises Refused for what cannot be represented."""
    p = published.read(Published, hf, FIXED)
    rotary, _ = rope.rope_from(p.rope_scaling or p.rope_parameters, p.rope_theta, p.max_position_embeddings, "half")
    attention = {
        "scheme": "gqa",
        "heads": p.num_attention_heads,
        "kv_heads": p.num_key_value_heads or p.num_attention_heads,
        "head_dim": p.head_dim or p.hidden_size // p.num_attention_heads,
        "window": p.sliding_window,
        "rope": rotary,
    }
    moe = {
        "scheme": "moe",
        "experts": p.num_local_experts,
        "top_k": p.num_experts_per_tok,
        "hidden": p.intermediate_size,
        "router": {"affinity": "softmax", "normalise": True},
    }
    return plan.config(
        [{"attention": attention, "feedforward": moe}] * p.num_hidden_layers,
        **plan.trunk_from(p),
    )


def config_to(config: ModelConfig) -> dict[str, Any]:
    """Ours to config.json. Raises Refused where Mixtral cannot hold the model."""
    layers = plan.layers(config, SCHEMES)
    a, moe = layers[0].attention, layers[0].feedforward
    hf = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **plan.trunk_to(config, layers),
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_dim,
        "sliding_window": a.window,
        "rope_parameters": rope.rope_to(a.rope),
        "num_local_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "intermediate_size": moe.hidden,
        **rope.positions_to(a.rope),
    }
    return plan.verified(config, hf, config_from)


def tensor_names(config: ModelConfig) -> names.Names:
    """Our tensors' names to Transformers'; on disk, the experts keep the names of Mistral's own release."""
    mlp, ours = "model.layers.{layer}", "blocks.{layer}.feedforward.feedforward"
    experts = mlp + ".block_sparse_moe.experts.{expert}"
    return {
        **names.OUTER,
        **names.GQA,
        f"{ours}.router.logits.weight": (f"{mlp}.block_sparse_moe.gate.weight", f"{mlp}.mlp.gate.weight"),
        f"{ours}.experts.gate_up": (
            (f"{experts}.w1.weight", f"{experts}.w3.weight"),
            f"{mlp}.mlp.experts.gate_up_proj",
        ),
        f"{ours}.experts.down": ((f"{experts}.w2.weight",), f"{mlp}.mlp.experts.down_proj"),
    }
