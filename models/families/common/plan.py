"""Layer plans: from a family's depths to stacks, and the proof that a family can say what a model is."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

from conf import schema
from conf.schema import Refused
from models.config import Layer, ModelConfig, resolve, resolve_mtp, resolve_residual

UNPUBLISHED = frozenset({"balance_loss", "z_loss", "bias_rate", "kl_loss", "keeps"})
"""Keys that change no logit, and that no config.json holds: losses of training, and what of its state is cached."""


def config(layers: list[dict[str, Any]], **values: Any) -> ModelConfig:
    """A ModelConfig of these depths, equal neighbours as one stack."""
    stacks = [{"repeat": len(list(same)), "of": [layer]} for layer, same in itertools.groupby(layers)]
    return schema.build(ModelConfig, {"layers": stacks, **values}, "model")


def layers(model: ModelConfig, schemes: Mapping[str, Collection[str]], *, shared: bool = False) -> list[Layer]:
    """The depths of `model`, known to use `schemes` alone ("attention", "feedforward", "injection").

    shared: whether a layer may read another's state. Raises Refused.
    """
    plans = [plan for stack in model.layers for _ in range(stack.repeat) for plan in stack.of]
    for depth, plan in enumerate(plans):
        for folder in ("attention", "feedforward", "injection"):
            section, known = getattr(plan, folder), schemes.get(folder, ["none"])
            if section is not None and section.get("scheme") not in known:
                raise Refused(f"layer {depth}'s {folder} is {section.get('scheme')}, not {' or '.join(known)}")
        if plan.reads is not None and not shared:
            raise Refused(f"layer {depth} reads {'a writer' if plan.reads == 'alone' else 'another layer'}'s state")
    return resolve(model)


class Trunk(Protocol):
    """The keys of config.json that most families call alike."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def rms_norm_eps(self) -> float: ...
    @property
    def tie_word_embeddings(self) -> bool: ...
    @property
    def initializer_range(self) -> float: ...


def trunk_from(p: Trunk) -> dict[str, Any]:
    """Those keys to ours."""
    return {
        "vocab": p.vocab_size,
        "width": p.hidden_size,
        "norm_eps": p.rms_norm_eps,
        "tied": p.tie_word_embeddings,
        "std": p.initializer_range,
    }


def trunk_to(model: ModelConfig, depths: list[Layer]) -> dict[str, Any]:
    """Ours to those keys, and how many layers there are."""
    return {
        "vocab_size": model.vocab,
        "hidden_size": model.width,
        "num_hidden_layers": len(depths),
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tied,
        "initializer_range": model.std,
    }


def routed(depths: list[Layer]) -> list[bool]:
    """Which depths have experts."""
    return [hasattr(layer.feedforward, "experts") for layer in depths]


def widths_to(depths: list[Layer]) -> dict[str, Any]:
    """Keys of config.json, as Qwen3-MoE and Laguna call them, for the dense layers and for those with experts, where
    there are any."""
    has_experts = routed(depths)
    hf = {}
    if not all(has_experts):
        hf["intermediate_size"] = depths[has_experts.index(False)].feedforward.hidden
    if any(has_experts):
        moe = depths[has_experts.index(True)].feedforward
        hf |= {
            "num_experts": moe.experts,
            "num_experts_per_tok": moe.top_k,
            "moe_intermediate_size": moe.hidden,
        }
    return hf


def verified(
    model: ModelConfig, published: dict[str, Any], config_from: Callable[[Mapping[str, Any]], ModelConfig]
) -> dict[str, Any]:
    """`published`, if reading it back gives `model`. Raises Refused with the first thing that would be lost."""
    if lost := difference(model, config_from(published)):
        raise Refused(lost)
    return published


def difference(model: ModelConfig, other: ModelConfig) -> str:
    """Where two models differ first, in words, what is unpublished aside; empty where they do not."""
    return _difference(_comparable(model), _comparable(other), "")


def _comparable(model: ModelConfig) -> dict[str, Any]:
    own = ("layers", "mtp")
    plain = {field.name: getattr(model, field.name) for field in dataclasses.fields(model) if field.name not in own}
    return {**plain, "residual": resolve_residual(model), "layer": dict(enumerate(resolve(model))), "mtp": _mtp(model)}


def _mtp(model: ModelConfig) -> dict[str, Any] | None:
    """What a checkpoint shows of it: how many modules, and not how often training applies each."""
    found = resolve_mtp(model)
    if found is None or model.mtp is None:
        return None
    scheme, layer = found
    return {"scheme": model.mtp["scheme"], "modules": scheme.modules, "layer": layer}


def _difference(mine: Any, other: Any, path: str) -> str:
    """Where the two differ first, in words; empty where they do not."""
    if type(mine) is not type(other):
        return f"{path} is {_short(mine)}, not {_short(other)}"
    if dataclasses.is_dataclass(mine):
        names = [field.name for field in dataclasses.fields(mine) if field.name not in UNPUBLISHED]
        pairs = [(f"{path}.{name}", getattr(mine, name), getattr(other, name)) for name in names]
    elif isinstance(mine, dict):
        pairs = [(f"{path}.{key}".strip("."), mine[key], other.get(key)) for key in mine]
    elif isinstance(mine, float):
        return "" if math.isclose(mine, other, rel_tol=1e-9) else f"{path} is {mine}, not {other}"
    else:
        return "" if mine == other else f"{path} is {_short(mine)}, not {_short(other)}"
    return next((found for where, a, b in pairs if (found := _difference(a, b, where))), "")


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "set"
    return type(value).__module__.rpartition(".")[2] if dataclasses.is_dataclass(value) else str(value)  # its scheme
