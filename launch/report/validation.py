"""What one validation line says of each held-out source, and of the loss by position."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class Source:
    """One held-out source. loss: nats per scored token. bpb: None where it is no text. accuracy: share ranked first.

    facts: what a synthetic task says of itself, {"task": "niah", "length": 512, "depth": 0.5}; empty for a corpus.
    """

    name: str
    loss: float
    bpb: float | None
    accuracy: float
    tokens: int
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Positions:
    """edges: [bins + 1] offsets in the window. loss: [bins] nats per scored token; NaN for a bin without any."""

    edges: tuple[float, ...]
    loss: tuple[float, ...]


def sources(line: Mapping[str, Any]) -> dict[str, Source]:
    """By name; empty where the line names none. Raises ValueError, TypeError, KeyError or AttributeError for others."""
    return {name: _source(str(name), values) for name, values in (line.get("val_sources") or {}).items()}


def positions(line: Mapping[str, Any]) -> Positions | None:
    """None where the line has none. Raises as `sources` does."""
    values = line.get("val_position")
    if values is None:
        return None
    edges = tuple(map(float, values["edges"]))
    loss = tuple(float("nan") if value is None else float(value) for value in values["loss"])
    if len(edges) != len(loss) + 1 or any(low >= high for low, high in pairwise(edges)):
        raise ValueError(f"{len(edges)} edges do not enclose {len(loss)} bins")
    return Positions(edges, loss)


def _source(name: str, values: Mapping[str, Any]) -> Source:
    bpb = values.get("bpb")
    return Source(
        name=name,
        loss=float(values["loss"]),
        bpb=None if bpb is None else float(bpb),
        accuracy=float(values["accuracy"]),
        tokens=int(values["tokens"]),
        facts=dict(values.get("facts") or {}),
    )
