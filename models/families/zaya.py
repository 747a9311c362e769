"""ZAYA1 (arXiv 2511.17127, 2605.05365): compressed convolutional attention, one expert a token, an affine residual.

Transformers' form, which skips with an output of nothing. It starts the key temperature at 0, where queries and keys
get no gradient; a model trained here starts at 1. Its compressor knows no packed documents: rows of one alone agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.config import ModelConfig
from models.families.common import names, plan, published, rope

SCHEMES = {"attention": ["cca"], "feedforward": ["depth_moe"]}
FIXED = {"lm_head_bias": False, "num_experts_per_tok": 1}
FULL, SLIDING = "hybrid", "hybrid_sliding"


@dataclass(frozen=True)
class Published:
    """config.json, with the defaults of Transformers' ZayaConfig."""

    vocab_size: int = 262_272
    hidden_size: int = 2048
    num_hidden_layers: int = 40
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 128
    max_position_embeddings: int = 131_072
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    rope_parameters: dict[str, Any] | None = None
    sliding_window: int | None = None
    moe_intermediate_size: int = 2048
    num_experts: int = 16
    layer_types: list[str] | None = None
    attention_bias: bool = False
    router_hidden_size: int = 256
    cca_time0: int = 2
    cca_time1: int = 2

    def __post_init__(self) -> None:
        unknown = set(self.layer_types or []) - {FULL, SLIDING}
        if unknown:
            raise ValueError(f"layer_types holds '{min(unknown)}'; there is {FULL} and {SLIDING}")
        if SLIDING in (self.layer_types or []) and self.sliding_window is None:
            raise ValueError(f"layer_types holds {SLIDING}, which needs sliding_window")


def config_from(hf: Mapping[str, Any]) -> ModelConfig:
    """config.json to ours. Raises Refused for what cannot be represented."""
    p = published.read(Published, hf, FIXED)
    kinds = p.layer_types or [FULL] * p.num_hidden_layers
    return plan.config(
        [{"attention": _attention(p, kind), "feedforward": _experts(p, depth)} for depth, kind in enumerate(kinds)],
        **plan.trunk_from(p),
        residual={"scheme": "affine"},
    )


def _attention(p: Published, kind: str) -> dict[str, Any]:
    given = (p.rope_parameters or {}).get(kind, {"rope_theta": 5e6 if kind == FULL else 1e4})
    share = given.get("partial_rotary_factor", 0.5 if p.rope_parameters is None else 1.0)
    rest = {key: value for key, value in given.items() if key != "partial_rotary_factor"}
    rotary, _ = rope.rope_from(rest, 1e4, p.max_position_embeddings, "half")
    return {
        "scheme": "cca",
        "heads": p.num_attention_heads,
        "kv_heads": p.num_key_value_heads,
        "head_dim": p.head_dim,
        "rope_dim": int(p.head_dim * share),
        "channel_taps": p.cca_time0,
        "head_taps": p.cca_time1,
        "window": p.sliding_window if kind == SLIDING else None,
        "bias": p.attention_bias,
        "rope": rotary,
    }


def _experts(p: Published, depth: int) -> dict[str, Any]:
    return {
        "scheme": "depth_moe",
        "experts": p.num_experts,
        "hidden": p.moe_intermediate_size,
        "router_hidden": p.router_hidden_size,
        "first": depth == 0,
        "norm_eps": p.rms_norm_eps,
    }


def config_to(config: ModelConfig) -> dict[str, Any]:
    """Ours to config.json. Raises Refused where ZAYA cannot hold the model."""
    layers = plan.layers(config, SCHEMES)
    kinds = [FULL if layer.attention.window is None else SLIDING for layer in layers]
    a, experts = layers[0].attention, layers[0].feedforward
    by_kind = {kind: layers[kinds.index(kind)].attention for kind in dict.fromkeys(kinds)}
    windows = [attention.window for kind, attention in by_kind.items() if kind == SLIDING]
    hf = {
        "architectures": ["ZayaForCausalLM"],
        "model_type": "zaya",
        **plan.trunk_to(config, layers),
        "layer_types": kinds,
        "sliding_window": windows[0] if windows else None,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_dim,
        "attention_bias": a.bias,
        "cca_time0": a.channel_taps,
        "cca_time1": a.head_taps,
        "rope_parameters": {
            kind: rope.rope_to(attention.rope) | {"partial_rotary_factor": attention.rope_dim / attention.head_dim}
            for kind, attention in by_kind.items()
        },
        "num_experts": experts.experts,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": experts.hidden,
        "router_hidden_size": experts.router_hidden,
    }
    return plan.verified(config, hf, config_from)


def tensor_names(config: ModelConfig) -> names.Names:
    """Our tensors' names to Transformers'. The moments of the balancing biases are of training alone."""
    attention = {
        f"{ours}.{part}": f"{theirs}.{part}"
        for ours, theirs in {
            "query": "qkv_proj.q_proj",
            "key": "qkv_proj.k_proj",
            "value_now": "qkv_proj.v_proj_current",
            "value_before": "qkv_proj.v_proj_delayed",
            "output": "o_proj",
        }.items()
        for part in ("weight", "bias")
    }
    convolutions = {
        f"convolutions.{ours}_{part}": f"qkv_proj.conv_qk_{theirs}.{part}"
        for ours, theirs in {"channel": "depthwise", "head": "grouped"}.items()
        for part in ("weight", "bias")
    }
    router = {
        f"router.{ours}.{part}": f"gate.{theirs}.{part}"
        for ours, theirs in {
            "down": "down_proj",
            "hidden_1": "router_mlp.fc1",
            "hidden_2": "router_mlp.fc2",
            "logits": "router_mlp.out_proj",
        }.items()
        for part in ("weight", "bias")
    }
    affine = {
        "output_scale": "hidden_states_scale",
        "output_bias": "hidden_states_bias",
        "stream_scale": "residual_scale",
        "stream_bias": "residual_bias",
    }
    moments = [f"blocks.{{layer}}.feedforward.feedforward.router.bias_{name}" for name in ("mean", "square", "steps")]
    return {
        **names.OUTER,
        "ends.scale": ("model.input_hidden_states_scale",),
        "ends.bias": ("model.input_hidden_states_bias",),
        **names.prefixed(
            "attention.attention", "self_attn", attention | convolutions | {"temperature": "qk_norm.temp"}
        ),
        **names.prefixed("attention.residual", "post_attention_residual_scale", affine),
        **names.prefixed("feedforward.residual", "post_mlp_residual_scale", affine),
        **names.prefixed(
            "feedforward.feedforward",
            "mlp",
            router
            | {
                "router.decay": "gate.router_states_scale",
                "router.norm.gain": "gate.router_mlp.norm.weight",
                "router.bias": "gate.balancing_biases",
                "experts.gate_up": "experts.gate_up_proj",
                "experts.down": "experts.down_proj",
            },
        ),
        **dict.fromkeys(moments, (names.TRAINING_ALONE,)),
    }
