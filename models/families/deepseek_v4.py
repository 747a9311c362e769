"""DeepSeek-V4 (report, arXiv 2606.19348): windowed, compressed sparse and heavily compressed layers, hash layers and
√softplus-routed experts, hyper-connected streams.

Where Transformers differs from DeepSeek, or from us: its compressors take a row for one document, so that packed
documents leak into each other; it has no loss for the indexer, and no multi-token prediction, whose tensors it ignores.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from conf.schema import Refused
from models.config import ModelConfig, resolve_mtp
from models.families.common import mtp, plan, published, rope
from models.families.common.names import Flat, Names, Spelling, first_name, renamed

SCHEMES = {"attention": ["swa", "csa", "hca"], "feedforward": ["moe"]}
FIXED = {
    "num_key_value_heads": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "attention_bias": False,
    "mlp_bias": False,
    "router_jitter_noise": 0.0,
}
SLIDING, SPARSE, HEAVY = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
KINDS = {"swa": SLIDING, "csa": SPARSE, "hca": HEAVY}
RATES = {SPARSE: 4, HEAVY: 128}
RATIOS = {0: SLIDING, 4: SPARSE, 128: HEAVY}
AFFINITIES = {"sqrtsoftplus": "sqrt_softplus", "sigmoid": "sigmoid"}


@dataclass(frozen=True)
class Published:
    """config.json, with the defaults of Transformers' DeepseekV4Config; the last keys are those of the releases."""

    vocab_size: int = 129_280
    hidden_size: int = 4096
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 43
    num_attention_heads: int = 64
    head_dim: int = 512
    q_lora_rank: int = 1024
    num_experts_per_tok: int = 6
    n_routed_experts: int = 256
    scoring_func: str = "sqrtsoftplus"
    routed_scaling_factor: float = 1.5
    max_position_embeddings: int = 1_048_576
    rope_theta: float = 10_000.0
    layer_types: list[str] | None = None
    compress_rates: dict[str, int] | None = None
    compress_rope_theta: float = 160_000.0
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    mlp_layer_types: list[str] | None = None
    swiglu_limit: float = 10.0
    sliding_window: int = 128
    o_groups: int = 8
    o_lora_rank: int = 1024
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 512
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    partial_rotary_factor: float | None = None
    num_nextn_predict_layers: int = 1
    compress_ratios: list[int] | None = None
    num_hash_layers: int = 3
    qk_rope_head_dim: int | None = None

    def __post_init__(self) -> None:
        if self.scoring_func not in AFFINITIES:
            raise ValueError(f"scoring_func is '{self.scoring_func}', but only {' and '.join(AFFINITIES)} are known")
        if len(self.attention_kinds()) != self.num_hidden_layers:
            raise ValueError("layer_types must name one kind for each of num_hidden_layers")
        if unknown := set(self.attention_kinds()) - {SLIDING, SPARSE, HEAVY}:
            raise ValueError(f"layer_types names '{min(unknown)}', which DeepSeek-V4 does not have")
        if len(self.routers()) != self.num_hidden_layers or set(self.routers()) - {"hash_moe", "moe"}:
            raise ValueError("mlp_layer_types must name hash_moe or moe for each of num_hidden_layers")

    def attention_kinds(self) -> list[str]:
        """By depth. Where config.json lists none, as Transformers fills them in; no release leaves them out."""
        if self.layer_types is not None:
            return self.layer_types[: self.num_hidden_layers]
        if self.compress_ratios is not None:
            return [RATIOS.get(ratio, str(ratio)) for ratio in self.compress_ratios[: self.num_hidden_layers]]
        return [SPARSE if depth > 2 and depth % 2 else HEAVY for depth in range(self.num_hidden_layers)]

    def routers(self) -> list[str]:
        """By depth."""
        if self.mlp_layer_types is not None:
            return self.mlp_layer_types[: self.num_hidden_layers]
        return ["hash_moe" if depth < self.num_hash_layers else "moe" for depth in range(self.num_hidden_layers)]

    def rotated(self) -> int:
        """Numbers of a head that are rotated."""
        given = self.qk_rope_head_dim
        if self.partial_rotary_factor is not None:
            return int(self.head_dim * self.partial_rotary_factor)
        return self.head_dim // 8 if given is None else given

    def ropes(self) -> dict[str, dict[str, Any]]:
        """Our `rope` sections: of the windowed layers, and of the compressed ones."""
        given = dict(self.rope_scaling or self.rope_parameters or {})
        if isinstance(given.get("main"), Mapping) and isinstance(given.get("compress"), Mapping):
            main, compress = dict(given["main"]), dict(given["compress"])
        else:
            main, compress = {"rope_theta": self.rope_theta}, given | {"rope_theta": self.compress_rope_theta}
            if "yarn" in (compress.get("rope_type"), compress.get("type")):
                compress.setdefault("attention_factor", 1.0)
        ropes = {}
        for kind, parameters in (("main", main), ("compress", compress)):
            parameters.pop("partial_rotary_factor", None)
            if not parameters.pop("truncate", True):  # Transformers looks for it beside the two, where it cannot stand
                print("config.json's rope_parameters.truncate is a key that nothing reads.", file=sys.stderr)
            ropes[kind], _ = rope.rope_from(parameters, self.rope_theta, self.max_position_embeddings, "interleaved")
        return ropes


def config_from(hf: Mapping[str, Any]) -> ModelConfig:
    """config.json to ours. Raises Refused for what cannot be represented."""
    p = published.read(Published, hf, FIXED)
    ropes, rates = p.ropes(), RATES | (p.compress_rates or {})
    shared = {
        "heads": p.num_attention_heads,
        "head_dim": p.head_dim,
        "rope_dim": p.rotated(),
        "query_latent": p.q_lora_rank,
        "window": p.sliding_window,
        "output": {"groups": p.o_groups, "rank": p.o_lora_rank},
        "norm_eps": p.rms_norm_eps,
    }
    indexer = {"heads": p.index_n_heads, "head_dim": p.index_head_dim, "top_k": p.index_topk}
    compressed = shared | {"rope": ropes["compress"]}
    attention = {
        SLIDING: {"scheme": "swa", **shared, "rope": ropes["main"]},
        SPARSE: {"scheme": "csa", **compressed, "rate": rates[SPARSE], "indexer": indexer},
        HEAVY: {"scheme": "hca", **compressed, "rate": rates[HEAVY]},
    }
    router = {"affinity": AFFINITIES[p.scoring_func], "scaling": p.routed_scaling_factor}
    moe = {
        "scheme": "moe",
        "experts": p.n_routed_experts,
        "top_k": p.num_experts_per_tok,
        "hidden": p.moe_intermediate_size,
        "shared_hidden": p.moe_intermediate_size,
        "clamp": p.swiglu_limit,
    }
    feedforward = {
        "hash_moe": moe | {"router": router | {"hash_vocab": p.vocab_size}},
        "moe": moe | {"router": router | {"bias": True}},
    }
    further = {"attention": attention[SLIDING], "feedforward": feedforward["moe"]}
    count = p.num_nextn_predict_layers
    return plan.config(
        [
            {"attention": attention[kind], "feedforward": feedforward[routed]}
            for kind, routed in zip(p.attention_kinds(), p.routers(), strict=True)
        ],
        mtp={"scheme": "streams", "depth": count, "layer": further} if count else None,
        **plan.trunk_from(p),
        residual={
            "scheme": "mhc",
            "streams": p.hc_mult,
            "rounds": p.hc_sinkhorn_iters,
            "eps": p.hc_eps,
            "norm_eps": p.rms_norm_eps,
        },
    )


def config_to(config: ModelConfig) -> dict[str, Any]:
    """Ours to config.json. Raises Refused where DeepSeek-V4 cannot hold the model."""
    layers = plan.layers(config, SCHEMES)
    if config.residual["scheme"] != "mhc":
        raise Refused(f"its residual is {config.residual['scheme']}, not mhc")
    plans = [depth for stack in config.layers for _ in range(stack.repeat) for depth in stack.of]
    kinds = [KINDS[depth.attention["scheme"]] for depth in plans]
    by_kind = {kind: layer.attention for kind, layer in zip(kinds, layers, strict=True)}
    further = resolve_mtp(config)
    if further is not None:
        by_kind.setdefault(SLIDING, further[1].attention)
    a, moe = layers[0].attention, layers[0].feedforward
    hf = {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        **plan.trunk_to(config, layers),
        "num_attention_heads": a.heads,
        "head_dim": a.head_dim,
        "q_lora_rank": a.query_latent,
        "sliding_window": a.window,
        "o_groups": a.output.groups,
        "o_lora_rank": a.output.rank,
        "partial_rotary_factor": a.rope_dim / a.head_dim,
        "layer_types": kinds,
        "compress_rates": {kind: by_kind[kind].rate if kind in by_kind else rate for kind, rate in RATES.items()},
        "mlp_layer_types": ["moe" if layer.feedforward.router.hash_vocab is None else "hash_moe" for layer in layers],
        "num_nextn_predict_layers": mtp.modules(config),
        **_ropes_to(by_kind, a.rope_dim / a.head_dim),
        **_experts_to(moe),
        **_residual_to(config),
    }
    if SPARSE in by_kind:
        indexer = by_kind[SPARSE].indexer
        hf |= {"index_n_heads": indexer.heads, "index_head_dim": indexer.head_dim, "index_topk": indexer.top_k}
    return plan.verified(config, hf, config_from)


def _ropes_to(by_kind: Mapping[str, Any], partial: float) -> dict[str, Any]:
    compressed = by_kind.get(SPARSE, by_kind.get(HEAVY))
    used = {"main": by_kind.get(SLIDING, compressed).rope, "compress": (compressed or by_kind[SLIDING]).rope}
    parameters = {name: rope.rope_to(turned) | {"partial_rotary_factor": partial} for name, turned in used.items()}
    return {"rope_parameters": parameters, **rope.positions_to(used["compress"])}


def _experts_to(moe: Any) -> dict[str, Any]:
    affinities = {ours: theirs for theirs, ours in AFFINITIES.items()}
    if moe.router.affinity not in affinities:
        raise Refused(f"its router's affinity is {moe.router.affinity}")
    if moe.clamp is None:
        raise Refused("its SwiGLU has no clamp")
    return {
        "n_routed_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.hidden,
        "scoring_func": affinities[moe.router.affinity],
        "routed_scaling_factor": moe.router.scaling,
        "swiglu_limit": moe.clamp,
    }


def _residual_to(config: ModelConfig) -> dict[str, Any]:
    keys = {"streams": "hc_mult", "rounds": "hc_sinkhorn_iters", "eps": "hc_eps"}
    return {theirs: config.residual[ours] for ours, theirs in keys.items() if ours in config.residual}


# ours: (as Transformers writes it, as it holds it, as DeepSeek releases it), where the last two differ from the first
ATTENTION: Mapping[str, tuple[str, ...]] = {
    "sink": ("attn.attn_sink", "self_attn.sinks"),
    "query_down.weight": ("attn.wq_a.weight", "self_attn.q_a_proj.weight"),
    "query_norm.gain": ("attn.q_norm.weight", "self_attn.q_a_norm.weight"),
    "query.weight": ("attn.wq_b.weight", "self_attn.q_b_proj.weight"),
    "kv.weight": ("attn.wkv.weight", "self_attn.kv_proj.weight"),
    "kv_norm.gain": ("attn.norm.weight", "self_attn.kv_norm.weight", "attn.kv_norm.weight"),
    "output.wide.weight": ("attn.wo_b.weight", "self_attn.o_b_proj.weight"),
    "index_query.query.weight": ("attn.indexer.wq_b.weight", "self_attn.compressor.indexer.q_b_proj.weight"),
    "index_query.weight.weight": (
        "attn.indexer.weights_proj.weight",
        "self_attn.compressor.indexer.scorer.weights_proj.weight",
    ),
}
COMPRESSOR: Mapping[str, tuple[str, str]] = {
    "value.weight": ("wkv.weight", "kv_proj.weight"),
    "gate.weight": ("wgate.weight", "gate_proj.weight"),
    "position_bias": ("ape", "position_bias"),
    "norm.gain": ("norm.weight", "kv_norm.weight"),
}
COMPRESSORS = {
    "compressor": ("attn.compressor", "self_attn.compressor"),
    "index_compressor": ("attn.indexer.compressor", "self_attn.compressor.indexer"),
}
COEFFICIENTS = {"projection": "fn", "bias": "base", "gate": "scale"}
FEEDFORWARD: Mapping[str, tuple[str, ...]] = {
    "router.logits.weight": ("ffn.gate.weight", "mlp.gate.weight"),
    "router.bias": ("ffn.gate.bias", "mlp.gate.e_score_correction_bias"),
    "router.table.experts": ("ffn.gate.tid2eid", "mlp.gate.tid2eid"),
    "shared.gate.weight": ("ffn.shared_experts.w1.weight", "mlp.shared_experts.gate_proj.weight"),
    "shared.up.weight": ("ffn.shared_experts.w3.weight", "mlp.shared_experts.up_proj.weight"),
    "shared.down.weight": ("ffn.shared_experts.w2.weight", "mlp.shared_experts.down_proj.weight"),
}


def tensor_names(config: ModelConfig) -> Names:
    """Our tensors' names to those that Transformers writes and holds, and those of DeepSeek's releases."""
    attention, feedforward = "attention.attention", "feedforward.feedforward"
    rows: dict[str, tuple[str, ...]] = {f"{attention}.{ours}": theirs for ours, theirs in ATTENTION.items()}
    rows |= {f"{feedforward}.{ours}": theirs for ours, theirs in FEEDFORWARD.items()}
    for ours, (written, held) in COMPRESSORS.items():
        parts = COMPRESSOR.items()
        rows |= {f"{attention}.{ours}.{part}": (f"{written}.{a}", f"{held}.{b}") for part, (a, b) in parts}
    for sublayer, short in (("attention", "attn"), ("feedforward", "ffn")):
        for ours, theirs in COEFFICIENTS.items():
            rows[f"{sublayer}.residual.coefficients.{ours}"] = (f"hc_{short}_{theirs}", f"{short}_hc.{theirs}")
    rows["attention.norm.gain"] = ("attn_norm.weight", "input_layernorm.weight")
    rows["feedforward.norm.gain"] = ("ffn_norm.weight", "post_attention_layernorm.weight")
    found: dict[str, tuple[Spelling, ...]] = {
        f"blocks.{{layer}}.{ours}": _at_depth(theirs) for ours, theirs in rows.items()
    }
    group = _at_depth(("attn.wo_a.weight", "self_attn.o_a_proj.weight"))
    found[f"blocks.{{layer}}.{attention}.output.narrow.weight"] = tuple(Flat(str(name)) for name in group)
    experts = "ffn.experts.{expert}"
    found |= {
        f"blocks.{{layer}}.{feedforward}.experts.gate_up": (
            *((f"{p}{experts}.w1.weight", f"{p}{experts}.w3.weight") for p in PREFIXES),
            "model.layers.{layer}.mlp.experts.gate_up_proj",
        ),
        f"blocks.{{layer}}.{feedforward}.experts.down": (
            *((f"{p}{experts}.w2.weight",) for p in PREFIXES),
            "model.layers.{layer}.mlp.experts.down_proj",
        ),
        "embedding.weight": ("model.embed_tokens.weight", "embed.weight"),
        "norm.gain": ("model.norm.weight", "norm.weight"),
        "head.weight": ("head.weight", "lm_head.weight"),
    }
    for ours, theirs in COEFFICIENTS.items():
        found[f"ends.coefficients.{ours}"] = (f"model.hc_head.hc_{theirs}", f"hc_head_{theirs}")
    return {**found, **_further(found, mtp.modules(config))}


def _further(names: Names, modules: int) -> Names:
    """Of multi-token prediction's modules, which Transformers has no spelling for: as DeepSeek releases them."""
    outside = PREFIXES[1]
    released: dict[str, tuple[Spelling, ...]] = {}
    for name, row in names.items():
        if name.startswith("blocks."):
            spellings = [spelling for spelling in row if first_name(spelling).startswith(outside)]
            released[name] = tuple((spellings[2:] or spellings)[:1])
    found: dict[str, tuple[Spelling, ...]] = {}
    for index in range(modules):
        module = f"mtp.{index}"  # ours and theirs
        for name, (spelling,) in released.items():
            found[name.replace("blocks.{layer}", f"{module}.block")] = (_within(module, spelling),)
        found |= {
            f"{module}.join.embedding_norm.gain": (f"{module}.enorm.weight",),
            f"{module}.join.hidden_norm.gain": (f"{module}.hnorm.weight",),
            f"{module}.join.embedding.weight": (f"{module}.e_proj.weight",),
            f"{module}.join.hidden.weight": (f"{module}.h_proj.weight",),
            f"{module}.norm.gain": (f"{module}.norm.weight",),
        }
        for coefficient, theirs in COEFFICIENTS.items():
            found[f"{module}.ends.coefficients.{coefficient}"] = (f"{module}.hc_head_{theirs}",)
    return found


PREFIXES = ("model.layers.{layer}.", "layers.{layer}.")


def _at_depth(spellings: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(prefix + spelling for prefix in PREFIXES for spelling in spellings)


def _within(module: str, spelling: Spelling) -> Spelling:
    """The same tensor of a module of multi-token prediction, which is no layer."""
    return renamed(spelling, lambda name: f"{module}.{name.removeprefix(PREFIXES[1])}")
