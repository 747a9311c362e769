"""Which rows of the table of schemes are worth a compilation: sizes change no graph, what an option turns on does."""

from __future__ import annotations

from collections.abc import Collection, Hashable
from typing import Any

import pytest

from tests.schemes import TABLE, Row

PARTS = ("attention", "feedforward", "injection")
MANY = 100  # more than the tokens of any row


def mechanisms(row: Row) -> set[Hashable]:
    """The schemes of a row, and whether a layer reads another's state."""
    found: set[Hashable] = {("model", plan["scheme"]) for plan in row.model.values() if isinstance(plan, dict)}
    for plan in row.layers:
        found.add(("reads", plan["reads"] is None))
        found |= {(part, plan[part]["scheme"]) for part in PARTS if plan[part] is not None}
    return found


def options(row: Row) -> set[Hashable]:
    """The keys of a row's plans, each with what kind of value it has; and which schemes read another layer's state."""
    found = set(_options(dict(row.model), ("model",)))
    for plan in row.layers:
        found.add(("reads", plan["attention"]["scheme"], plan["reads"] is None))
        for part in PARTS:
            if plan[part] is not None:
                found |= set(_options(plan[part], (part,)))
    return found


def _options(plan: dict[str, Any], where: tuple[str, ...]) -> list[Hashable]:
    where = (*where, plan.get("scheme", ""))
    found: list[Hashable] = []
    for key, value in plan.items():
        found += _options(value, (*where, key)) if isinstance(value, dict) else [(*where, key, _kind(value))]
    return found


def _kind(value: Any) -> Any:
    """Of a size: nothing, one, several, or more than there are; anything else is its own kind."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return value if value in (0, 1) else "many" if value >= MANY else "several"


def _cover(wanted: dict[str, set[Hashable]], known: Collection[Hashable] = ()) -> list[str]:
    """Names of few rows, short ones first, that have between them all that any row has, beyond what is known; none of
    which the others make superfluous."""
    seen, chosen = set(known), list[str]()
    while True:
        gain = {name: len(found - seen) / len(TABLE[name].layers) for name, found in wanted.items()}
        best = max(gain, key=gain.__getitem__)
        if not gain[best]:
            break
        chosen.append(best)
        seen |= wanted[best]
    for name in list(chosen):
        others = set(known).union(*(wanted[other] for other in chosen if other != name))
        if wanted[name] <= others:
            chosen.remove(name)
    return chosen


_OPTIONS = {name: options(row) for name, row in TABLE.items()}
_WHOLE = _cover({name: mechanisms(row) for name, row in TABLE.items()})
_FORWARD = _cover(_OPTIONS, set().union(*(_OPTIONS[name] for name in _WHOLE)))

GRAPHS = [
    *(pytest.param(TABLE[name], "aot_eager_default_partitioner", id=name) for name in _WHOLE),
    *(pytest.param(TABLE[name], "eager", id=f"{name}, forward") for name in _FORWARD),
]
"""Rows and the backend to compile them with: the graph of the backward too, or that of the forward alone.

What a backward keeps is not in question here, so that the partitioner is the one which does not search for the least.
"""
