"""What DeepSeek-V3 and its descendants have in common: latent attention, dense layers, sigmoid-routed experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from conf.schema import Refused
from models.config import Layer, ModelConfig, resolve_mtp
from models.families.common import mtp, names, plan, rope

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
    mlp_layer_types: list[str] | None = None
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
    num_nextn_predict_layers: int = 0
    # derived by Transformers from the others
    head_dim: int | None = None
    qk_head_dim: int | None = None

    def is_dense(self, depth: int) -> bool:
        if self.mlp_layer_types is None:
            return depth < self.first_k_dense_replace
        return depth < len(self.mlp_layer_types) and self.mlp_layer_types[depth] == "dense"

    def __post_init__(self) -> None:
        if self.num_key_value_heads not in (None, self.num_attention_heads):
            raise ValueError(
                "num_key_value_heads must equal num_attention_heads: the latent has no KV heads of its own"
            )
        kinds = self.mlp_layer_types
        if kinds is not None and (len(kinds) != self.num_hidden_layers or set(kinds) - {"dense", "sparse"}):
            raise ValueError(f"mlp_layer_types must say dense or sparse for each of {self.num_hidden_layers} layers")


def config_from(p: Published, **attention_of_its_own: Any) -> ModelConfig:
    """config.json to ours; further keys of the attention, its scheme among them. Raises Refused."""
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
        **attention_of_its_own,
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
    # multi-token prediction's layer is the one after the last
    *layers, further = [
        {"attention": attention, "feedforward": dense if p.is_dense(depth) else moe}
        for depth in range(p.num_hidden_layers + 1)
    ]
    count = p.num_nextn_predict_layers
    return plan.config(
        layers,
        mtp={"scheme": "concat", "depth": count, "layer": further} if count else None,
        **plan.trunk_from(p),
    )


def config_to(
    config: ModelConfig, depths: list[Layer], reading: Callable[[Mapping[str, Any]], ModelConfig], **own: Any
) -> dict[str, Any]:
    """Ours to config.json, with the keys of the family's own. Raises Refused where `reading` it back gives another
    model."""
    routed = plan.routed(depths)
    num_dense = routed.index(True) if any(routed) else len(depths)
    a = depths[0].attention
    hf = {
        **plan.trunk_to(config, depths),
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.heads,
        "kv_lora_rank": a.latent,
        "q_lora_rank": a.query_latent,
        "qk_nope_head_dim": a.nope_dim,
        "qk_rope_head_dim": a.rope_dim,
        "v_head_dim": a.value_dim,
        "attention_bias": a.bias,
        "rope_parameters": rope.rope_to(a.rope, a.scale_multiplier),
        "first_k_dense_replace": num_dense,
        "num_nextn_predict_layers": mtp.modules(config),
        **rope.positions_to(a.rope),
        **own,
    }
    further = resolve_mtp(config)
    every = depths if further is None else [*depths, further[1]]
    for layer, has_experts in zip(every, plan.routed(every), strict=True):
        hf |= _experts_to(layer.feedforward) if has_experts else {"intermediate_size": layer.feedforward.hidden}
    return plan.verified(config, hf, reading)


def kinds(depths: list[Layer]) -> list[str]:
    """`mlp_layer_types`."""
    return ["sparse" if has_experts else "dense" for has_experts in plan.routed(depths)]


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


def tensor_names(config: ModelConfig, depths: list[Layer], more: Mapping[str, str]) -> names.Names:
    """Our tensors' names to Transformers'. more: of the attention."""
    query_latent = depths[0].attention.query_latent is not None
    attention = {
        "query_down.weight": "q_a_proj.weight",
        "query_down.bias": "q_a_proj.bias",
        "query_norm.gain": "q_a_layernorm.weight",
        "query.weight": "q_b_proj.weight" if query_latent else "q_proj.weight",
        "latent.weight": "kv_a_proj_with_mqa.weight",
        "latent.bias": "kv_a_proj_with_mqa.bias",
        "latent_norm.gain": "kv_a_layernorm.weight",
        "expansion.weight": "kv_b_proj.weight",
        "output.weight": "o_proj.weight",
        "output.bias": "o_proj.bias",
        **more,
    }
    experts = {
        "router.bias": "gate.e_score_correction_bias",
        "shared.gate.weight": "shared_experts.gate_proj.weight",
        "shared.up.weight": "shared_experts.up_proj.weight",
        "shared.down.weight": "shared_experts.down_proj.weight",
    }
    rows = {
        **names.OUTER,
        **names.DENSE,
        **names.EXPERTS,
        **names.prefixed("attention.attention", "self_attn", attention),
        **names.prefixed("feedforward.feedforward", "mlp", experts),
    }
    return mtp.with_further_layers(rows, config, len(depths))
