"""What claims are measured on: the models that ship, changed in one point or not, without memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from conf import schema
from models import catalog, cost, mechanism
from models.cache import Cache
from models.config import LayerPlan, ModelConfig, Stack
from models.contract import Attention
from models.model import Model
from models.storage import Storage

PACKED, BF16 = Storage("packed"), Storage("bf16")

LONG, MILLION = 2**17, 2**20
"""Tokens: what the press calls 128K and 1M."""

Change = Callable[[LayerPlan], LayerPlan]


@cache
def shipped(name: str) -> ModelConfig:
    return schema.build(ModelConfig, catalog.section(name, {}), f"model {name}")


@cache
def model(name: str) -> Model:
    """As it ships, on the meta device."""
    return built(shipped(name))


def built(config: ModelConfig) -> Model:
    """Computing in bf16, in which its cache is allocated then."""
    with torch.device("meta"):
        return Model(config, torch.bfloat16)


def changed(name: str, change: Change) -> Model:
    """The model with every layer's plan changed."""
    config = shipped(name)
    return built(replace(config, layers=[Stack(list(map(change, stack.of)), stack.repeat) for stack in config.layers]))


def unshared(layer: LayerPlan) -> LayerPlan:
    """The layer with a state of its own."""
    return replace(layer, reads=None)


def with_attention(**keys: Any) -> Change:
    """The same keys for every layer, those of its own where none is given."""
    return lambda layer: replace(layer, attention={**layer.attention, **keys})


def plans(name: str) -> list[LayerPlan]:
    """Layer by layer."""
    return [plan for stack in shipped(name).layers for _ in range(stack.repeat) for plan in stack.of]


def attention(width: int, plan: Mapping[str, Any]) -> Attention:
    """One layer's, on the meta device."""
    with torch.device("meta"):
        module: Attention = mechanism.config_of("attention", plan, "attention").build(width)
    return module


def allocated(of: Model, tokens: int) -> dict[str, int]:
    """Bytes of a decode cache for one sequence, by kind and in total, as torch allocates them."""
    held = Cache(of, 1, tokens, "meta").num_bytes()
    return held | {"total": sum(held.values())}


def fits(of: Model, memory: float, weight_bytes: float, store: Storage) -> int:
    """The longest context whose cache fits beside the weights, 0 where these alone do not."""
    left = memory - weight_bytes * cost.parameters(of).total
    return cost.longest_context(of, left, store)
