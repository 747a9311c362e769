"""Random small configurations of DeepSeek-V4."""

from __future__ import annotations

import random
from typing import Any

KINDS = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]

TINY: dict[str, Any] = {
    "num_hidden_layers": 3,
    "moe_intermediate_size": 6,
    "num_key_value_heads": 1,
    "n_routed_experts": 4,
    "head_dim": 8,
    "partial_rotary_factor": 0.5,
    "q_lora_rank": 5,
    "layer_types": KINDS,
    "mlp_layer_types": ["hash_moe", "moe", "moe"],
    "compress_rates": {KINDS[1]: 2, KINDS[2]: 3},
    "sliding_window": 3,
    "o_groups": 2,
    "o_lora_rank": 3,
    "index_n_heads": 16,
    "index_head_dim": 6,
    "index_topk": 2,
    "hc_mult": 2,
}
"""A layer of each kind."""


def deepseek_v4(draw: random.Random, common: dict[str, Any]) -> dict[str, Any]:
    """common: what every family draws. Any mix of layers and routers; blocks of a few tokens, fewer chosen than
    there are."""
    layers, groups = draw.randint(1, 4), draw.choice([1, 2])
    rope_dim = draw.choice([2, 4, 6])
    head_dim = draw.choice([rope_dim, 8, 16])
    experts = draw.randint(2, 6)
    return common | {
        "num_hidden_layers": layers,
        "hidden_size": draw.randint(5, 20),
        "moe_intermediate_size": draw.randint(4, 12),
        "num_attention_heads": groups * draw.choice([1, 2, 3]),
        "head_dim": head_dim,
        "partial_rotary_factor": rope_dim / head_dim,
        "q_lora_rank": draw.randint(4, 12),
        "n_routed_experts": experts,
        "num_experts_per_tok": draw.randint(2, experts),
        "scoring_func": draw.choice(["sqrtsoftplus", "sqrtsoftplus", "sigmoid"]),
        "routed_scaling_factor": draw.choice([1.0, 1.5, 2.5]),
        "swiglu_limit": draw.choice([0.1, 1.0, 10.0]),
        "layer_types": [draw.choice(KINDS) for _ in range(layers)],
        "mlp_layer_types": [draw.choice(["hash_moe", "moe"]) for _ in range(layers)],
        "compress_rates": {KINDS[1]: draw.choice([2, 3, 4]), KINDS[2]: draw.choice([2, 5, 8])},
        "compress_rope_theta": draw.choice([100.0, 1.6e5]),
        "rope_theta": draw.choice([50.0, 1e4]),
        "sliding_window": draw.choice([1, 3, 7, 30]),
        "o_groups": groups,
        "o_lora_rank": draw.randint(2, 6),
        # with few heads, scores of exactly 0 are common, and Transformers leaves ties to chance
        "index_n_heads": draw.choice([16, 24]),
        "index_head_dim": rope_dim + draw.choice([0, 2, 4]),
        "index_topk": draw.choice([1, 2, 3, 20]),
        "hc_mult": draw.choice([2, 3, 4]),
        "hc_sinkhorn_iters": draw.choice([1, 3, 20]),
        "hc_eps": draw.choice([1e-6, 1e-3]),
    }
