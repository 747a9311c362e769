"""GPT-2 (Radford et al. 2019, "Language models are unsupervised multitask learners"; Transformer, arXiv 1706.03762):
learned positions, layer norms, heads of their own keys and values, a feed-forward without a gate.

Its dropout is a matter of training there, and there is none here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from conf.schema import Refused
from models.config import ModelConfig
from models.families.common import plan, published
from models.families.common.names import IGNORED, Names, Share, Spelling

SCHEMES = {"attention": ["gqa"], "feedforward": ["mlp"]}
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "silu": "silu",
    "swish": "silu",
}


@dataclass(frozen=True)
class Published:
    """config.json, with the defaults of Transformers' GPT2Config."""

    vocab_size: int = 50_257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True
    # another order of the same operations
    reorder_and_upcast_attn: bool = False
    # of training
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    # of its older releases, n_positions once more
    n_ctx: int | None = None
    # of other heads than the language model's
    summary_type: str = "cls_index"
    summary_use_proj: bool = True
    summary_activation: str | None = None
    summary_proj_to_labels: bool = True
    summary_first_dropout: float = 0.1
    task_specific_params: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.n_head < 1 or self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if self.activation_function not in ACTIVATIONS:
            raise ValueError(
                f"activation_function is '{self.activation_function}', but only {', '.join(ACTIVATIONS)} are known"
            )

    def scale(self, depth: int) -> float | None:
        """Of the scores; None for 1 / √head_dim."""
        usual = (self.n_embd // self.n_head) ** -0.5
        scale = usual if self.scale_attn_weights else 1.0
        if self.scale_attn_by_inverse_layer_idx:
            scale /= depth + 1
        return None if scale == usual else scale


def config_from(hf: Mapping[str, Any]) -> ModelConfig:
    """config.json to ours. Raises Refused for what cannot be represented."""
    p = published.read(Published, hf, {})
    attention = {
        "scheme": "gqa",
        "heads": p.n_head,
        "kv_heads": p.n_head,
        "head_dim": p.n_embd // p.n_head,
        "bias": True,
        "rope": None,
    }
    feedforward = {
        "scheme": "mlp",
        "hidden": 4 * p.n_embd if p.n_inner is None else p.n_inner,
        "activation": ACTIVATIONS[p.activation_function],
        "bias": True,
    }
    return plan.config(
        [
            {"attention": attention | {"scale": p.scale(depth)}, "feedforward": feedforward}
            for depth in range(p.n_layer)
        ],
        vocab=p.vocab_size,
        width=p.n_embd,
        norm="layer",
        norm_eps=p.layer_norm_epsilon,
        positions=p.n_positions,
        tied=p.tie_word_embeddings,
        std=p.initializer_range,
    )


def config_to(config: ModelConfig) -> dict[str, Any]:
    """Ours to config.json. Raises Refused where GPT-2 cannot hold the model."""
    layers = plan.layers(config, SCHEMES)
    if config.positions is None:
        raise Refused("it has no learned positions")
    a, scales = layers[0].attention, [layer.attention.scale for layer in layers]
    activations = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    hf = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab,
        "n_positions": config.positions,
        "n_embd": config.width,
        "n_layer": len(layers),
        "n_head": a.heads,
        "n_inner": layers[0].feedforward.hidden,
        "activation_function": activations[layers[0].feedforward.activation],
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.std,
        "scale_attn_weights": scales[0] is None,
        "scale_attn_by_inverse_layer_idx": len(set(scales)) > 1,
        "tie_word_embeddings": config.tied,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        # Transformers' defaults lie beyond a small vocabulary
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return plan.verified(config, hf, config_from)


ATTENTION, FEEDFORWARD = "blocks.{layer}.attention", "blocks.{layer}.feedforward"
NORMS = {
    "norm": "ln_f",
    f"{ATTENTION}.norm": "h.{layer}.ln_1",
    f"{FEEDFORWARD}.norm": "h.{layer}.ln_2",
}
MATRICES: Mapping[str, tuple[str, int]] = {
    f"{ATTENTION}.attention.query": ("h.{layer}.attn.c_attn", 0),
    f"{ATTENTION}.attention.key": ("h.{layer}.attn.c_attn", 1),
    f"{ATTENTION}.attention.value": ("h.{layer}.attn.c_attn", 2),
    f"{ATTENTION}.attention.output": ("h.{layer}.attn.c_proj", 0),
    f"{FEEDFORWARD}.feedforward.up": ("h.{layer}.mlp.c_fc", 0),
    f"{FEEDFORWARD}.feedforward.down": ("h.{layer}.mlp.c_proj", 0),
}
"""Ours to theirs, which holds several one after another and its weights transposed; and which of them it is."""


def tensor_names(config: ModelConfig) -> Names:
    """Our tensors' names to Transformers', and to those of the first release: no prefix, and masks beside weights."""
    plan.layers(config, SCHEMES)
    rows: dict[str, tuple[Spelling, ...]] = {
        "embedding.weight": _spelled("wte.weight"),
        "positions.weight": _spelled("wpe.weight"),
        "head.weight": ("lm_head.weight",),
        IGNORED: (r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",),
    }
    for ours, theirs in NORMS.items():
        rows |= {f"{ours}.gain": _spelled(f"{theirs}.weight"), f"{ours}.bias": _spelled(f"{theirs}.bias")}
    for ours, (theirs, part) in MATRICES.items():
        rows[f"{ours}.weight"] = tuple(Share(name, 0, part, transposed=True) for name in _spelled(f"{theirs}.weight"))
        rows[f"{ours}.bias"] = tuple(Share(name, 0, part) for name in _spelled(f"{theirs}.bias"))
    return rows


def _spelled(name: str) -> tuple[str, str]:
    return f"transformer.{name}", name
