"""DeepSeek-V3 (arXiv 2412.19437): latent attention, a few dense layers, then sigmoid-routed experts.

Also the text towers of DeepSeek-R1 and Kimi K2. What training alone needs (multi-token prediction) is not held.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from conf.schema import Refused
from models.config import ModelConfig
from models.families.common import names, plan, published, rope

SCHEMES = {"attention": ["mla"], "feedforward": ["dense", "moe"]}
FIXED = {"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}


@dataclass(frozen=True)
class Published:
    """config.json, with the defaults of Transformers' DeepseekV3Config."""

    vocab_size: int = 129_280
    hidden_size: int = 7168
    intermediate_size: int = 18_432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    num_key_value_heads: int | None = None
    n_shared_experts: int = 1
    n_routed_experts: int = 256
    routed_scaling_factor: float = 2.5
    kv_lora_rank: int = 512
    q_lora_rank: int | None = 1536
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    qk_nope_head_dim: int = 128
    n_group: int = 8
    topk_group: int = 4
    num_experts_per_tok: int = 8
    first_k_dense_replace: int = 3
    norm_topk_prob: bool = True
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_theta: float = 10_000.0
    rope_interleave: bool = True
    attention_bias: bool = False
    # derived by Transformers from the others, or about modules that it does not run
    head_dim: int | None = None
    qk_head_dim: int | None = None
    num_nextn_predict_layers: int = 0

    def __post_init__(self) -> None:
        if self.num_key_value_heads not in (None, self.num_attention_heads):
            raise ValueError(
                "num_key_value_heads must equal num_attention_heads: the latent has no KV heads of its own"
            )


def config_from(hf: Mapping[str, Any]) -> ModelConfig:
    """config.json to ours. Raises Refused for what cannot be represented."""
    p = published.read(Published, hf, FIXED)
    rotary, multiplier = rope.rope_from(
        p.rope_scaling or p.rope_parameters,
        p.rope_theta,
        p.max_position_embeddings,
        "interleaved" if p.rope_interleave else "half",
    )
    attention = {
        "scheme": "mla",
        "heads": p.num_attention_heads,
        "latent": p.kv_lora_rank,
        "nope_dim": p.qk_nope_head_dim,
        "rope_dim": p.qk_rope_head_dim,
        "value_dim": p.v_head_dim,
        "query_latent": p.q_lora_rank,
        "scale_multiplier": multiplier,
        "bias": p.attention_bias,
        "rope": rotary,
    }
    dense = {"scheme": "dense", "hidden": p.intermediate_size}
    moe = {
        "scheme": "moe",
        "experts": p.n_routed_experts,
        "top_k": p.num_experts_per_tok,
        "hidden": p.moe_intermediate_size,
        "shared_hidden": p.moe_intermediate_size * p.n_shared_experts,
        "router": {
            "affinity": "sigmoid",
            "normalise": p.norm_topk_prob,
            "scaling": p.routed_scaling_factor,
            "bias": True,
            "groups": p.n_group,
            "kept_groups": p.topk_group,
        },
    }
    layers = [
        {"attention": attention, "feedforward": dense if depth < p.first_k_dense_replace else moe}
        for depth in range(p.num_hidden_layers)
    ]
    return plan.config(
        layers,
        vocab=p.vocab_size,
        width=p.hidden_size,
        norm_eps=p.rms_norm_eps,
        tied=p.tie_word_embeddings,
        std=p.initializer_range,
    )


def config_to(config: ModelConfig) -> dict[str, Any]:
    """Ours to config.json. Raises Refused where DeepSeek-V3 cannot hold the model."""
    layers = plan.layers(config, SCHEMES)
    routed = plan.routed(layers)
    num_dense = routed.index(True) if any(routed) else len(layers)
    a = layers[0].attention
    hf = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": len(layers),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "initializer_range": config.std,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.heads,
        "kv_lora_rank": a.latent,
        "q_lora_rank": a.query_latent,
        "qk_nope_head_dim": a.nope_dim,
        "qk_rope_head_dim": a.rope_dim,
        "v_head_dim": a.value_dim,
        "attention_bias": a.bias,
        "rope_interleave": a.rope.pairing == "interleaved",
        "rope_parameters": rope.rope_to(a.rope, a.scale_multiplier),
        "first_k_dense_replace": num_dense,
        "num_nextn_predict_layers": 0,
        **rope.positions_to(a.rope),
    }
    if num_dense > 0:
        hf["intermediate_size"] = layers[0].feedforward.hidden
    if num_dense < len(layers):
        hf |= _experts_to(layers[num_dense].feedforward)
    return plan.verified(config, hf, config_from)


def _experts_to(moe: Any) -> dict[str, Any]:
    num_shared, rest = divmod(moe.shared_hidden, moe.hidden)
    if rest:
        raise Refused(f"its shared experts' width {moe.shared_hidden} is no multiple of one expert's, {moe.hidden}")
    return {
        "n_routed_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.hidden,
        "n_shared_experts": num_shared,
        "norm_topk_prob": moe.router.normalise,
        "routed_scaling_factor": moe.router.scaling,
        "n_group": moe.router.groups,
        "topk_group": moe.router.kept_groups,
    }


def tensor_names(config: ModelConfig) -> names.Names:
    """Our tensors' names to Transformers'."""
    bottleneck = plan.layers(config, SCHEMES)[0].attention.query_latent is not None
    attention = {
        "query_down.weight": "q_a_proj.weight",
        "query_down.bias": "q_a_proj.bias",
        "query_norm.gain": "q_a_layernorm.weight",
        "query.weight": "q_b_proj.weight" if bottleneck else "q_proj.weight",
        "latent.weight": "kv_a_proj_with_mqa.weight",
        "latent.bias": "kv_a_proj_with_mqa.bias",
        "latent_norm.gain": "kv_a_layernorm.weight",
        "expansion.weight": "kv_b_proj.weight",
        "output.weight": "o_proj.weight",
        "output.bias": "o_proj.bias",
    }
    experts = {
        "router.bias": "gate.e_score_correction_bias",
        "shared.gate.weight": "shared_experts.gate_proj.weight",
        "shared.up.weight": "shared_experts.up_proj.weight",
        "shared.down.weight": "shared_experts.down_proj.weight",
    }
    return {
        **names.OUTER,
        **names.DENSE,
        **names.EXPERTS,
        **names.prefixed("attention.attention", "self_attn", attention),
        **names.prefixed("feedforward.feedforward", "mlp", experts),
    }
