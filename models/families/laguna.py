"""Laguna (poolside, arXiv 2605.27605; read in Transformers 5.23): windows and full layers, each kind with head counts
and rotations of its own, a softplus gate on what each head reads, sigmoid-routed experts beside a shared one.

`gating: true` means a gate for each head, as in Transformers; a release that means one for each element by it
(Laguna M.1) is refused for the shape of its g_proj, and is read once its config.json says "per-element". Transformers
reads YaRN's `truncate` beside the kinds of layers and passes over what a kind says: refused where the two differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from models.config import Layer, ModelConfig
from models.families.common import names, plan, published, rope

SCHEMES = {"attention": ["gqa"], "feedforward": ["dense", "moe"]}
FIXED = {"moe_apply_router_weight_on_input": False, "moe_router_logit_softcapping": 0.0}

SLIDING, FULL = "sliding_attention", "full_attention"

ROPES: Mapping[str, Mapping[str, Any]] = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0},
    FULL: {"rope_type": "default", "rope_theta": 500_000.0, "partial_rotary_factor": 0.5},
}

GATES: Mapping[bool | str, str] = {True: "head", "per-head": "head", "per-element": "element"}


@dataclass(frozen=True)
class Published:
    """config.json, with the defaults of Transformers' LagunaConfig, which are not the release's.

    rope_parameters: by kind of layer; what else stands beside the kinds, as in the release, is not read.
    """

    vocab_size: int = 100_352
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 40
    num_attention_heads: int = 48
    num_attention_heads_per_layer: list[int] | None = None
    num_key_value_heads: int = 8
    head_dim: int = 128
    max_position_embeddings: int = 131_072
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    partial_rotary_factor: float = 1.0
    attention_bias: bool = False
    gating: bool | str = True
    sliding_window: int = 512
    layer_types: list[Literal["sliding_attention", "full_attention"]] | None = None
    mlp_layer_types: list[Literal["dense", "sparse"]] | None = None
    num_experts: int = 256
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 512
    shared_expert_intermediate_size: int = 512
    moe_routed_scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        for name in ("layer_types", "mlp_layer_types", "num_attention_heads_per_layer"):
            by_layer = getattr(self, name)
            if by_layer is not None and len(by_layer) != self.num_hidden_layers:
                raise ValueError(f"{name} must have a value for each of the {self.num_hidden_layers} layers")
        if self.gating not in GATES:
            raise ValueError(f"gating ({self.gating!r}) must be true, 'per-head' or 'per-element'")
        for kind in set(self.kinds()):
            if not isinstance(self.rotary(kind), Mapping):
                raise ValueError(f"rope_parameters must hold a mapping for {kind}, which is a kind of layer here")
            share = self.share(kind)
            if not isinstance(share, int | float) or not 0 <= share <= 1:
                raise ValueError(f"partial_rotary_factor of {kind} ({share!r}) must be a number between 0 and 1")
            if self.rotary(kind).get("truncate", self.truncate) != self.truncate:
                raise ValueError(f"rope_parameters.truncate must stand beside {kind}, not in it, to be read")

    @property
    def truncate(self) -> bool:
        """Of YaRN, in every layer."""
        return bool((self.rope_parameters or {}).get("truncate", True))

    def kinds(self) -> list[str]:
        """By layer."""
        return [FULL] * self.num_hidden_layers if self.layer_types is None else [*self.layer_types]

    def rotary(self, kind: str) -> Any:
        """The rotary parameters of one kind of layers, None where there are none."""
        return (ROPES if self.rope_parameters is None else self.rope_parameters).get(kind)

    def share(self, kind: str) -> Any:
        """Of a head, that is rotated."""
        return self.rotary(kind).get("partial_rotary_factor", self.partial_rotary_factor)

    def heads(self, depth: int) -> int:
        by_layer = self.num_attention_heads_per_layer
        return self.num_attention_heads if by_layer is None else by_layer[depth]

    def routed(self, depth: int) -> bool:
        """Whether a layer has experts."""
        return depth > 0 if self.mlp_layer_types is None else self.mlp_layer_types[depth] == "sparse"


def config_from(hf: Mapping[str, Any]) -> ModelConfig:
    """config.json to ours. Raises Refused for what cannot be represented."""
    p = published.read(Published, hf, FIXED)
    dense = {"scheme": "dense", "hidden": p.intermediate_size}
    moe = {
        "scheme": "moe",
        "experts": p.num_experts,
        "top_k": p.num_experts_per_tok,
        "hidden": p.moe_intermediate_size,
        "shared_hidden": p.shared_expert_intermediate_size,
        "router": {
            "affinity": "sigmoid",
            "normalise": True,
            "scaling": p.moe_routed_scaling_factor,
            "bias": True,
        },
    }
    return plan.config(
        [
            {"attention": _attention(p, depth), "feedforward": moe if p.routed(depth) else dense}
            for depth in range(p.num_hidden_layers)
        ],
        **plan.trunk_from(p),
    )


def _attention(p: Published, depth: int) -> dict[str, Any]:
    kind = p.kinds()[depth]
    given = {key: value for key, value in p.rotary(kind).items() if key != "partial_rotary_factor"}
    rotated = int(p.head_dim * p.share(kind))
    rotary, _ = rope.rope_from(given, ROPES[kind]["rope_theta"], p.max_position_embeddings, "half")
    if "yarn" in rotary:
        rotary["yarn"]["truncate"] = p.truncate
    return {
        "scheme": "gqa",
        "heads": p.heads(depth),
        "kv_heads": p.num_key_value_heads,
        "head_dim": p.head_dim,
        "window": p.sliding_window if kind == SLIDING else None,
        "qk_norm": True,
        "bias": p.attention_bias,
        "norm_eps": p.rms_norm_eps,
        "rope": rotary,
        "rope_dim": None if rotated == p.head_dim else rotated,
        "gate": GATES[p.gating],
    }


def config_to(config: ModelConfig) -> dict[str, Any]:
    """Ours to config.json. Raises Refused where Laguna cannot hold the model."""
    layers = plan.layers(config, SCHEMES)
    routed = plan.routed(layers)
    kinds = [SLIDING if layer.attention.window else FULL for layer in layers]
    of_kind = {kind: layers[kinds.index(kind)].attention for kind in sorted(set(kinds))}
    a = layers[0].attention
    hf: dict[str, Any] = {
        "architectures": ["LagunaForCausalLM"],
        "model_type": "laguna",
        **plan.trunk_to(config, layers),
        "num_attention_heads": a.heads,
        "num_attention_heads_per_layer": [layer.attention.heads for layer in layers],
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_dim,
        "attention_bias": a.bias,
        "gating": "per-element" if a.gate == "element" else True,
        "layer_types": kinds,
        "mlp_layer_types": ["sparse" if has_experts else "dense" for has_experts in routed],
        "rope_parameters": {kind: _rotary_to(attention) for kind, attention in of_kind.items()},
    }
    if not all(kind.get("truncate", True) for kind in hf["rope_parameters"].values()):
        hf["rope_parameters"]["truncate"] = False
    for attention in of_kind.values():
        hf |= rope.positions_to(attention.rope)
    if SLIDING in of_kind:
        hf["sliding_window"] = of_kind[SLIDING].window
    return plan.verified(config, hf | _feedforward_to(layers, routed), config_from)


def _rotary_to(attention: Any) -> dict[str, Any]:
    factor = attention.rotated_dim / attention.head_dim
    if int(attention.head_dim * factor) < attention.rotated_dim:
        factor = math.nextafter(factor, 1.0)
    return {**rope.rope_to(attention.rope), "partial_rotary_factor": factor}


def _feedforward_to(layers: list[Layer], routed: list[bool]) -> dict[str, Any]:
    hf = plan.widths_to(layers)
    if any(routed):
        moe = layers[routed.index(True)].feedforward
        hf["shared_expert_intermediate_size"] = moe.shared_hidden
        hf["moe_routed_scaling_factor"] = moe.router.scaling
    return hf


def tensor_names(config: ModelConfig) -> names.Names:
    """Our tensors' names to Transformers': as released, and as in its memory."""
    mlp, ours = "model.layers.{layer}.mlp", "blocks.{layer}.feedforward.feedforward"
    shared = {
        f"{ours}.shared.{part}.weight": tuple(f"{mlp}.{name}.{part}_proj.weight" for name in SHARED)
        for part in ("gate", "up", "down")
    }
    bias = "e_score_correction_bias"
    return {
        **names.OUTER,
        **names.GQA,
        **names.DENSE,
        **names.EXPERTS,
        **names.prefixed("attention.attention", "self_attn", {"gate.weight": "g_proj.weight"}),
        **shared,
        f"{ours}.router.bias": (f"{mlp}.experts.{bias}", f"{mlp}.gate.{bias}"),
    }


SHARED = ("shared_expert", "shared_experts")
