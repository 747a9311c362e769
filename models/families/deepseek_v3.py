"""DeepSeek-V3 (arXiv 2412.19437): latent attention, a few dense layers, then sigmoid-routed experts.

Also the text towers of DeepSeek-R1 and Kimi K2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig
from models.families.common import deepseek, names, plan, published

SCHEMES = {"attention": ["mla"], "feedforward": ["dense", "moe"]}


def config_from(hf: Mapping[str, Any]) -> ModelConfig:
    """config.json to ours. Raises Refused for what cannot be represented."""
    return deepseek.config_from(published.read(deepseek.Published, hf, deepseek.FIXED))


def config_to(config: ModelConfig) -> dict[str, Any]:
    """Ours to config.json. Raises Refused where DeepSeek-V3 cannot hold the model."""
    depths = plan.layers(config, SCHEMES)
    own = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "rope_interleave": depths[0].attention.rope.pairing == "interleaved",
    }
    return deepseek.config_to(config, depths, config_from, **own)


def tensor_names(config: ModelConfig) -> names.Names:
    """Our tensors' names to Transformers'."""
    return deepseek.tensor_names(config, plan.layers(config, SCHEMES), {})
