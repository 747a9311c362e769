"""Qwen3-MoE (arXiv 2505.09388): grouped-query attention with QK-norm, softmax-routed experts, dense layers where told.

Where `use_sliding_window` is set, every layer reads `sliding_window` tokens, the query's own included, whatever
`max_window_layers` says, as in Transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from models.config import ModelConfig
from models.families.common import names, plan, published, rope

SCHEMES = {"attention": ["gqa"], "feedforward": ["dense", "moe"]}


@dataclass(frozen=True)
class Published:
    """config.json, with the defaults of Transformers' Qwen3MoeConfig; it writes num_experts as num_local_experts."""

    vocab_size: int = 151_936
    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_hidden_layers: int = 24
    num_attention_heads: int = 32
    num_key_value_heads: int = 4
    head_dim: int | None = None
    max_position_embeddings: int = 32_768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int | None = None
    decoder_sparse_step: int = 1
    mlp_only_layers: list[int] | None = field(default_factory=list)
    moe_intermediate_size: int = 768
    num_experts_per_tok: int = 8
    num_experts: int | None = None
    num_local_experts: int | None = None
    norm_topk_prob: bool = False
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_theta: float = 10_000.0

    def __post_init__(self) -> None:
        if self.num_attention_heads < 1:
            raise ValueError("num_attention_heads must be at least 1")
        if self.decoder_sparse_step < 1:
            raise ValueError(f"decoder_sparse_step ({self.decoder_sparse_step}) must be at least 1")

    @property
    def experts(self) -> int:
        return next((n for n in (self.num_local_experts, self.num_experts) if n is not None), 128)

    def routed(self, depth: int) -> bool:
        """Whether a layer has experts."""
        on_step = (depth + 1) % self.decoder_sparse_step == 0
        return self.experts > 0 and on_step and depth not in (self.mlp_only_layers or [])


def config_from(hf: Mapping[str, Any]) -> ModelConfig:
    """config.json to ours. Raises Refused for what cannot be represented."""
    p = published.read(Published, hf, {})
    rotary, _ = rope.rope_from(p.rope_scaling or p.rope_parameters, p.rope_theta, p.max_position_embeddings, "half")
    attention = {
        "scheme": "gqa",
        "heads": p.num_attention_heads,
        "kv_heads": p.num_key_value_heads,
        "head_dim": p.head_dim or p.hidden_size // p.num_attention_heads,
        "window": p.sliding_window if p.use_sliding_window else None,
        "qk_norm": True,
        "bias": p.attention_bias,
        "norm_eps": p.rms_norm_eps,
        "rope": rotary,
    }
    dense = {"scheme": "dense", "hidden": p.intermediate_size}
    moe = {
        "scheme": "moe",
        "experts": p.experts,
        "top_k": p.num_experts_per_tok,
        "hidden": p.moe_intermediate_size,
        "router": {"affinity": "softmax", "normalise": p.norm_topk_prob},
    }
    return plan.config(
        [
            {"attention": attention, "feedforward": moe if p.routed(depth) else dense}
            for depth in range(p.num_hidden_layers)
        ],
        **plan.trunk_from(p),
    )


def config_to(config: ModelConfig) -> dict[str, Any]:
    """Ours to config.json. Raises Refused where Qwen3-MoE cannot hold the model."""
    layers = plan.layers(config, SCHEMES)
    routed = plan.routed(layers)
    a = layers[0].attention
    hf = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **plan.trunk_to(config, layers),
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_dim,
        "attention_bias": a.bias,
        "use_sliding_window": a.window is not None,
        "sliding_window": a.window,
        "rope_parameters": rope.rope_to(a.rope),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [depth for depth, has_experts in enumerate(routed) if not has_experts],
        **plan.widths_to(layers),
        **rope.positions_to(a.rope),
    }
    if any(routed):
        hf["norm_topk_prob"] = layers[routed.index(True)].feedforward.router.normalise
    return plan.verified(config, hf, config_from)


def tensor_names(config: ModelConfig) -> names.Names:
    """Our tensors' names to Transformers'."""
    return {**names.OUTER, **names.GQA, **names.DENSE, **names.EXPERTS}
