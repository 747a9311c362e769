"""DeepSeek-V3.2 (arXiv 2512.02556): DeepSeek-V3 with sparse attention; its indexer rotates pairs (i, i + size/2).

Transformers runs the indexer without a gradient and has no loss for it: fine-tuning there leaves it as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig
from models.families.common import sparse

FIXED: Mapping[str, Any] = {}


def config_from(hf: Mapping[str, Any]) -> ModelConfig:
    """config.json to ours. Raises Refused for what cannot be represented."""
    return sparse.config_from(hf, sparse.Published, FIXED, "half")


def config_to(config: ModelConfig) -> dict[str, Any]:
    """Ours to config.json. Raises Refused where DeepSeek-V3.2 cannot hold the model."""
    return sparse.config_to(config, config_from, "DeepseekV32ForCausalLM", "deepseek_v32")


tensor_names = sparse.tensor_names
