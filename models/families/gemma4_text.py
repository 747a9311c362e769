"""Gemma 4 (Google, 2026; read in Transformers 5.23 and DeepMind's JAX code): windows and full layers, sandwich norms;
the small ones with per-layer embeddings and a tail of layers that read others' keys and values, the larger with K = V.

What Transformers keeps in a buffer, each layer's scalar, is trained here, as in JAX. Released files still hold keys and
values of the layers that read others': nothing reads these, and they are not written back. On token ids alone the flag
for bidirectional vision changes nothing. Transformers gives the padding token's rows no gradient from being looked up;
here they get it, and whoever packs documents has no such token.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from conf.schema import Refused
from models.config import Layer, ModelConfig
from models.families.common import names, plan, published, rope

SCHEMES = {"attention": ["gqa", "tied_kv"], "feedforward": ["dense", "parallel"], "injection": ["ple"]}
FIXED = {"hidden_activation": "gelu_pytorch_tanh"}

SLIDING, FULL = "sliding_attention", "full_attention"

ROPES: Mapping[str, Mapping[str, Any]] = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
}


@dataclass(frozen=True)
class Sizes:
    """What may differ from layer to layer."""

    head_dim: int
    num_key_value_heads: int


@dataclass(frozen=True)
class Published:
    """config.json, with the defaults of Transformers' Gemma4TextConfig, which are no release's."""

    vocab_size: int = 262_144
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 30
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    max_position_embeddings: int = 131_072
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    rope_parameters: dict[str, dict[str, Any]] | None = None
    attention_bias: bool = False
    sliding_window: int = 512
    layer_types: list[Literal["sliding_attention", "full_attention"]] | None = None
    final_logit_softcapping: float | None = None
    use_bidirectional_attention: Literal["vision"] | None = None
    vocab_size_per_layer_input: int = 262_144
    hidden_size_per_layer_input: int = 256
    attention_k_eq_v: bool = False
    num_kv_shared_layers: int = 0
    enable_moe_block: bool = False
    use_double_wide_mlp: bool = False
    num_experts: int | None = None
    top_k_experts: int | None = None
    moe_intermediate_size: int | None = None
    # the sizes of full layers, as released, or by layer, as Transformers writes them
    global_head_dim: int = 512
    num_global_key_value_heads: int | None = None
    per_layer_config: dict[str, dict[str, int]] | None = None

    def __post_init__(self) -> None:
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"layer_types must name each of the {self.num_hidden_layers} layers")
        if self.hidden_size_per_layer_input and self.vocab_size_per_layer_input != self.vocab_size:
            raise ValueError("vocab_size_per_layer_input must equal vocab_size: a token is looked up in both tables")
        if self.enable_moe_block and None in (self.num_experts, self.top_k_experts, self.moe_intermediate_size):
            raise ValueError("enable_moe_block needs num_experts, top_k_experts and moe_intermediate_size")
        if not 0 <= self.num_kv_shared_layers < self.num_hidden_layers:
            raise ValueError("num_kv_shared_layers must leave at least one layer with keys and values of its own")

    def kinds(self) -> list[str]:
        """By layer; the last is always full, as in Transformers."""
        usual = [FULL if (i + 1) % 6 == 0 else SLIDING for i in range(self.num_hidden_layers)]
        return [*(self.layer_types or usual)[:-1], FULL]

    def sizes(self, depth: int) -> Sizes:
        """Of one layer. Raises Refused where config.json overrides something else."""
        own = Sizes(self.head_dim, self.num_key_value_heads)
        if self.per_layer_config is not None:
            overrides = self.per_layer_config.get(str(depth), {})
            if strange := overrides.keys() - vars(own).keys():
                raise Refused(f"config.json's per_layer_config sets {min(strange)}, which cannot differ by layer here.")
            return Sizes(**{**vars(own), **overrides})
        if self.kinds()[depth] == SLIDING:
            return own
        heads = self.num_global_key_value_heads if self.attention_k_eq_v else None
        return Sizes(self.global_head_dim, heads or own.num_key_value_heads)

    def writer(self, depth: int) -> int:
        """Whose keys and values a layer reads: the last of its kind that has some of its own. Raises Refused."""
        kinds, first = self.kinds(), self.num_hidden_layers - self.num_kv_shared_layers
        if depth < first:
            return depth
        same = [i for i in range(first) if kinds[i] == kinds[depth]]
        if not same:
            raise Refused(f"config.json's num_kv_shared_layers leaves no {kinds[depth]} with keys and values to share.")
        return same[-1]


def config_from(hf: Mapping[str, Any]) -> ModelConfig:
    """config.json to ours. Raises Refused for what cannot be represented."""
    p = published.read(Published, hf, FIXED)
    return plan.config(
        [_layer(p, depth) for depth in range(p.num_hidden_layers)],
        **plan.trunk_from(p),
        post_norm=True,
        block_scale=True,
        embedding_scale=math.sqrt(p.hidden_size),
        logit_cap=p.final_logit_softcapping,
    )


def _layer(p: Published, depth: int) -> dict[str, Any]:
    kind, sizes, writer = p.kinds()[depth], p.sizes(depth), p.writer(depth)
    rotary = (p.rope_parameters or ROPES).get(kind)
    attention = {
        "scheme": "tied_kv" if p.attention_k_eq_v and kind == FULL else "gqa",
        "heads": p.num_attention_heads,
        "kv_heads": sizes.num_key_value_heads,
        "head_dim": sizes.head_dim,
        "window": p.sliding_window if kind == SLIDING else None,
        "qk_norm": True,
        "value_norm": True,
        "scale": 1.0,
        "bias": p.attention_bias,
        "norm_eps": p.rms_norm_eps,
        "rope": rope.rope_from(rotary, ROPES[kind]["rope_theta"], p.max_position_embeddings, "half")[0],
    }
    hidden = p.intermediate_size * (2 if p.use_double_wide_mlp and writer != depth else 1)
    feedforward = {"scheme": "dense", "hidden": hidden, "activation": "gelu_tanh"}
    if p.enable_moe_block:
        feedforward = {
            "scheme": "parallel",
            "experts": p.num_experts,
            "top_k": p.top_k_experts,
            "hidden": p.moe_intermediate_size,
            "shared_hidden": hidden,
            "activation": "gelu_tanh",
            "router": {"affinity": "softmax", "normalise": True},
            "norm_eps": p.rms_norm_eps,
        }
    injection = {"scheme": "ple", "hidden": p.hidden_size_per_layer_input, "norm_eps": p.rms_norm_eps}
    return {
        "attention": attention,
        "feedforward": feedforward,
        "injection": injection if p.hidden_size_per_layer_input else None,
        "reads": writer if writer != depth else None,
    }


def config_to(config: ModelConfig) -> dict[str, Any]:
    """Ours to config.json. Raises Refused where Gemma 4 cannot hold the model."""
    layers = plan.layers(config, SCHEMES, shared=True)
    readers = [i for i, layer in enumerate(layers) if layer.writer != i]
    if any(getattr(layers[i].attention, "keeps", None) == "value" for i in readers):
        raise Refused("a layer that reads another's values has a key gain of its own; Gemma 4 keeps both to share them")
    kinds = [SLIDING if layer.attention.window else FULL for layer in layers]
    full = layers[-1].attention
    sliding = layers[kinds.index(SLIDING)].attention if SLIDING in kinds else full
    injected = layers[0].injection
    hf = {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        **plan.trunk_to(config, layers),
        "final_logit_softcapping": config.logit_cap,
        "num_attention_heads": full.heads,
        "num_key_value_heads": sliding.kv_heads,
        "num_global_key_value_heads": full.kv_heads,
        "head_dim": sliding.head_dim,
        "global_head_dim": full.head_dim,
        "attention_bias": full.bias,
        "attention_k_eq_v": hasattr(full, "keeps"),
        "num_kv_shared_layers": len(readers),
        "layer_types": kinds,
        "rope_parameters": {SLIDING: rope.rope_to(sliding.rope), FULL: rope.rope_to(full.rope)},
        "hidden_size_per_layer_input": 0 if injected is None else injected.hidden,
        "vocab_size_per_layer_input": config.vocab,
        **_feedforward_to(layers, readers),
    }
    if sliding.window is not None:
        hf["sliding_window"] = sliding.window
    return plan.verified(config, hf, config_from)


def _feedforward_to(layers: list[Layer], readers: list[int]) -> dict[str, Any]:
    first = layers[0].feedforward
    if plan.routed(layers)[0]:
        width, last = first.shared_hidden, getattr(layers[-1].feedforward, "shared_hidden", 0)
        experts = {"num_experts": first.experts, "top_k_experts": first.top_k, "moe_intermediate_size": first.hidden}
    else:
        width, last, experts = first.hidden, layers[-1].feedforward.hidden, {}
    return {
        "intermediate_size": width,
        "use_double_wide_mlp": bool(readers) and last == 2 * width,
        "enable_moe_block": bool(experts),
        **experts,
    }


_NORMS = {
    "attention.norm.gain": "input_layernorm.weight",
    "attention.post_norm.gain": "post_attention_layernorm.weight",
    "feedforward.norm.gain": "pre_feedforward_layernorm.weight",
    "feedforward.post_norm.gain": "post_feedforward_layernorm.weight",
    "injection.post_norm.gain": "post_per_layer_input_norm.weight",
    "scale": "layer_scalar",
}

_PARALLEL = {
    "dense_norm.gain": "pre_feedforward_layernorm.weight",
    "dense_post_norm.gain": "post_feedforward_layernorm_1.weight",
    "expert_norm.gain": "pre_feedforward_layernorm_2.weight",
    "expert_post_norm.gain": "post_feedforward_layernorm_2.weight",
    "router.logits.weight": "router.proj.weight",
    "router_scale": "router.scale",
    "expert_scale": "router.per_expert_scale",
    "experts.gate_up": "experts.gate_up_proj",
    "experts.down": "experts.down_proj",
    "shared.gate.weight": "mlp.gate_proj.weight",
    "shared.up.weight": "mlp.up_proj.weight",
    "shared.down.weight": "mlp.down_proj.weight",
}

_INJECTION = {"gate.weight": "per_layer_input_gate.weight", "output.weight": "per_layer_projection.weight"}


def tensor_names(config: ModelConfig) -> names.Names:
    """Our tensors' names to Transformers': of the language model alone, and, to be read, inside the multimodal one."""
    layer, ours = "model.layers.{layer}", "blocks.{layer}"
    rows: dict[str, str | names.Share] = {
        "embedding.weight": "model.embed_tokens.weight",
        "norm.gain": "model.norm.weight",
        "head.weight": "lm_head.weight",
        "preambles.0.gain": "model.per_layer_projection_norm.weight",
        f"{ours}.injection.feedforward.table": names.Share("model.embed_tokens_per_layer.weight", 1),
        f"{ours}.injection.feedforward.context.weight": names.Share("model.per_layer_model_projection.weight", 0),
        **{f"{ours}.{a}": f"{layer}.{b}" for a, b in _NORMS.items()},
        **{f"{ours}.feedforward.feedforward.{a}": f"{layer}.{b}" for a, b in _PARALLEL.items()},
        **{f"{ours}.injection.feedforward.{a}": f"{layer}.{b}" for a, b in _INJECTION.items()},
        **{row: theirs for part in (names.GQA, names.DENSE) for row, (theirs,) in part.items()},  # type: ignore[misc]
    }
    readers = [str(i) for i, layer in enumerate(plan.layers(config, SCHEMES, shared=True)) if layer.writer != i]
    dead = rf"model\.(language_model\.)?layers\.({'|'.join(readers)})\.self_attn\.(k_proj|v_proj|k_norm)\.(weight|bias)"
    return {
        **{row: (theirs, _inside(theirs)) for row, theirs in rows.items()},
        names.IGNORED: (dead,) if readers else (),
    }


def _inside(theirs: names.Spelling) -> names.Spelling:
    """The same tensor of the multimodal model."""
    return names.renamed(theirs, lambda name: re.sub(r"^model\.", "model.language_model.", name))
