"""Kimi K2.6 (arXiv 2507.20534, arXiv 2602.02276) as released, a multimodal model: its language model, a DeepSeek-V3, is
read, its tower for images is left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conf.schema import Refused
from models.config import ModelConfig
from models.families import deepseek_v3
from models.families.common import names, published

TOWER = r"(model\.)?(vision_tower|mm_projector)\..*"


def config_from(hf: Mapping[str, Any]) -> ModelConfig:
    """config.json's text_config to ours. Raises Refused for what cannot be represented.

    Whether the head is tied stands in the whole model's part; releases say that it is not.
    """
    tied = hf.get("tie_word_embeddings", False)
    return deepseek_v3.config_from({**published.text_config(hf), "tie_word_embeddings": tied})


def config_to(config: ModelConfig) -> dict[str, Any]:
    """Raises Refused: there is no tower to write."""
    raise Refused("its tower is not held here; deepseek_v3 is its language model")


def tensor_names(config: ModelConfig) -> names.Names:
    """Those of the language model, as released and as Transformers writes them: with the tower's word for a layer."""
    ways = (
        lambda name: f"language_model.{name}",
        lambda name: f"language_model.{name.replace('.layers.', '.blocks.')}",
    )
    table = deepseek_v3.tensor_names(config)
    spelled = {ours: tuple(names.renamed(one, way) for way in ways for one in row) for ours, row in table.items()}
    return {**spelled, names.IGNORED: (TOWER,)}
