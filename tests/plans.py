"""Models drawn at random: the mechanisms of the table of schemes, mixed as a layer plan may mix them.

A draw is a function of its number. What fits what is read from the mechanisms: a layer may read the state of an earlier
one that serves it, and a feed-forward needs its names provided.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch

from models import mechanism
from models.contract import FeedForward, Slot
from tests.schemes import TABLE, Plan, Row, layer

MOST_LAYERS = 5


def _each(plans: Iterable[Any]) -> list[Any]:
    """Every one once, in order, without those that are None."""
    found: list[Any] = []
    for plan in plans:
        if plan is not None and plan not in found:
            found.append(plan)
    return found


LAYERS = [plan for row in TABLE.values() for plan in row.layers]
ATTENTIONS: list[Plan] = _each(plan["attention"] for plan in LAYERS)
FEEDFORWARDS: list[Plan] = _each(plan["feedforward"] for plan in LAYERS)
INJECTIONS: list[Plan] = _each(plan["injection"] for plan in LAYERS)
MODELS: list[Mapping[str, Any]] = _each(row.model for row in TABLE.values())


def draw(number: int) -> Row:
    """1 to 5 layers, of which the later ones often read an earlier one."""
    by = random.Random(number)
    injection = by.choice(INJECTIONS)
    layers: list[Plan] = []
    writers: list[int] = []
    provided = {"ids", "embedding"}
    for depth in range(by.randint(1, MOST_LAYERS)):
        attention, reads = by.choice(ATTENTIONS), None
        if writers and by.random() < 0.4:
            writer = by.choice(writers)
            attention = by.choice(readers(layers[writer]["attention"]))
            reads = by.choice((writer, writer - depth))
        elif readers(attention):
            writers.append(depth)
        feedforward = by.choice([plan for plan in FEEDFORWARDS if names(plan)[0] <= provided])
        provided |= names(feedforward)[1]
        layers.append(layer(attention, feedforward, reads, injection if by.random() < 0.25 else None))
    return Row(tuple(layers), by.choice(MODELS))


def described(row: Row) -> str:
    """In words: the schemes of each layer, and whom it reads."""
    layers = []
    for plan in row.layers:
        reads = "" if plan["reads"] is None else f" reads {plan['reads']}"
        injected = "" if plan["injection"] is None else f" + {plan['injection']['scheme']}"
        layers.append(f"{plan['attention']['scheme']}{reads} + {plan['feedforward']['scheme']}{injected}")
    residual = row.model.get("residual", {"scheme": "plain"})["scheme"]
    return f"{residual}: {', '.join(layers)}"


def readers(writer: Plan) -> list[Plan]:
    """The plans of the table that may read what `writer` keeps."""
    kept, found = _slots(ATTENTIONS.index(writer), writes=True), []
    for index, plan in enumerate(ATTENTIONS):
        read = _slots(index, writes=False) if plan["scheme"] == writer["scheme"] else ()
        if len(read) == len(kept) and all(map(Slot.serves, kept, read)):
            found.append(plan)
    return found


@cache
def _slots(index: int, *, writes: bool) -> tuple[Slot, ...]:
    """Of an attention plan, by its index; none where it can only read a state of its own."""
    config = mechanism.config_of("attention", ATTENTIONS[index], "plan")
    try:
        with torch.device("meta"):
            return tuple(config.build(16, writes=writes).slots())
    except ValueError:
        return ()


def names(plan: Plan) -> tuple[frozenset[str], frozenset[str]]:
    """What a feed-forward reads of what the stream carries, and what it adds."""
    return _names(FEEDFORWARDS.index(plan))


@cache
def _names(index: int) -> tuple[frozenset[str], frozenset[str]]:
    with torch.device("meta"):
        built: FeedForward = mechanism.config_of("feedforward", FEEDFORWARDS[index], "plan").build(16)
    return frozenset(built.needs), frozenset(built.provides)
