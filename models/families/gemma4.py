"""Gemma 4 as released, a multimodal model: its language model is read, its towers for images and sound are left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conf.schema import Refused
from models.config import ModelConfig
from models.families import gemma4_text
from models.families.common import names, published

TOWERS = r"model\.(vision_tower|embed_vision|audio_tower|embed_audio)\..*"


def config_from(hf: Mapping[str, Any]) -> ModelConfig:
    """config.json's text_config to ours. Raises Refused for what cannot be represented."""
    return gemma4_text.config_from(published.text_config(hf))


def config_to(config: ModelConfig) -> dict[str, Any]:
    """Raises Refused: there are no towers to write."""
    raise Refused("its towers are not held here; gemma4_text is its language model")


def tensor_names(config: ModelConfig) -> names.Names:
    """Those of the language model."""
    table = gemma4_text.tensor_names(config)
    return {**table, names.IGNORED: (*table[names.IGNORED], TOWERS)}
