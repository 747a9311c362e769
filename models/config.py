"""A model as data: its sizes and its layer plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from conf import schema
from models import mechanism


@dataclass(frozen=True)
class LayerPlan:
    """One depth: which scheme, which feed-forward, what it injects from the token itself, and whose state the attention
    reads.

    reads: null for its own state; -n for the layer n before; n ≥ 0 for layer n. A layer that reads another's has no
    parameters for a state of its own (cross-layer attention, arXiv 2405.12981). alone: for the state of a writer that
    stands alone, with a norm and projections of its own, before this layer's attention; later layers name this layer to
    read it too (YOCO, arXiv 2405.05254).
    """

    attention: Mapping[str, Any]
    feedforward: Mapping[str, Any]
    injection: Mapping[str, Any] | None = None
    reads: int | Literal["alone"] | None = None


@dataclass(frozen=True)
class Stack:
    """Layers that repeat, in order."""

    of: list[LayerPlan]
    repeat: int = 1

    def __post_init__(self) -> None:
        if self.repeat < 1 or not self.of:
            raise ValueError("repeat must be at least 1, and `of` must hold at least one layer")


@dataclass(frozen=True)
class ModelConfig:
    """vocab: rows of the embedding. tied: the head is the embedding. std: of the initial matrices.

    norm: before each sublayer and the head. post_norm: one more on each sublayer's output. block_scale: a number for
    each layer, by which the residual is multiplied at its end (both Gemma 4). embedding_scale: factor on the embedding,
    rounded to the compute dtype. logit_cap: the logits are capped by a tanh to ± this. mtp: modules that training adds,
    to predict tokens further ahead (models/ahead.py); null for none. positions: rows of a table of learned positions,
    added to the embedding (GPT-2), and so the longest row of tokens; null for none.
    """

    vocab: int
    width: int
    layers: list[Stack]
    residual: Mapping[str, Any] = field(default_factory=lambda: {"scheme": "plain"})
    norm_eps: float = 1e-6
    tied: bool = False
    std: float = 0.02
    norm: Literal["rms", "layer"] = "rms"
    post_norm: bool = False
    block_scale: bool = False
    embedding_scale: float = 1.0
    logit_cap: float | None = None
    mtp: Mapping[str, Any] | None = None
    positions: int | None = None

    def __post_init__(self) -> None:
        if self.logit_cap is not None and self.logit_cap <= 0:
            raise ValueError(f"logit_cap ({self.logit_cap}) must be positive; leave it null for none")
        if self.positions is not None and self.positions < 1:
            raise ValueError(f"positions ({self.positions}) must be at least 1; leave it null for none")
        schema.at_least(0, self, "norm_eps", "std", "embedding_scale")
        if self.vocab < 2 or self.width < 1 or not self.layers:
            raise ValueError("vocab must be at least 2, width at least 1, and layers must not be empty")


@dataclass(frozen=True)
class Layer:
    """A layer plan, resolved: the mechanisms' own configs, and the writer's index (its own where it reads itself).

    alone: the writer stands by itself, at this layer.
    """

    attention: Any
    feedforward: Any
    injection: Any
    writer: int
    alone: bool = False


def resolve(config: ModelConfig) -> list[Layer]:
    """The plan, layer by layer. Raises schema.Refused where a layer cannot be."""
    layers: list[Layer] = []
    for s, stack in enumerate(config.layers):
        for _ in range(stack.repeat):
            for p, plan in enumerate(stack.of):
                layers.append(_resolve_layer(plan, layers, f"model.layers[{s}].of[{p}]"))
    return layers


def resolve_residual(config: ModelConfig) -> Any:
    """The residual scheme's own config. Raises schema.Refused where it cannot be."""
    return mechanism.config_of("residual", config.residual, "model.residual")


def resolve_mtp(config: ModelConfig) -> tuple[Any, Layer] | None:
    """Multi-token prediction: its scheme's own config, and the layer of its blocks; None where there is none. Raises
    schema.Refused where it cannot be."""
    if config.mtp is None:
        return None
    found = mechanism.config_of("mtp", config.mtp, "model.mtp")
    return found, _resolve_layer(found.layer, [], "model.mtp.layer")


def _resolve_layer(plan: LayerPlan, before: list[Layer], where: str) -> Layer:
    index = len(before)
    attention = mechanism.config_of("attention", plan.attention, f"{where}.attention")
    feedforward = mechanism.config_of("feedforward", plan.feedforward, f"{where}.feedforward")
    injection = None
    if plan.injection is not None:
        injection = mechanism.config_of("injection", plan.injection, f"{where}.injection")
    if plan.reads is None:
        return Layer(attention, feedforward, injection, index)
    if plan.reads == "alone":
        if not getattr(attention, "stands_alone", False):
            raise schema.Refused(
                f"{where}.reads is alone, but the state of {plan.attention['scheme']} is bound to its own layer's "
                "queries, so that no writer can stand alone; leave reads null, or choose another scheme."
            )
        return Layer(attention, feedforward, injection, index, alone=True)
    writer = plan.reads if plan.reads >= 0 else index + plan.reads
    if not 0 <= writer < index:
        raise schema.Refused(f"{where}.reads is {plan.reads}, but layer {index} can only read a layer before it.")
    if before[writer].writer != writer:
        raise schema.Refused(
            f"{where}.reads names layer {writer}, which writes no state; name layer {before[writer].writer}."
        )
    if type(before[writer].attention) is not type(attention):
        raise schema.Refused(
            f"{where}.reads names layer {writer}, whose attention scheme is another; a state fits its own scheme."
        )
    return Layer(attention, feedforward, injection, writer)
