"""Numbers as people read them."""

from __future__ import annotations

import math
from typing import Any

from launch.report.compare import Spread

UNKNOWN = "—"


def compact(value: float) -> str:
    """1.6M, 410k, 12."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def shown(value: float, kind: str) -> str:
    """One number of a quantity of that kind."""
    if not math.isfinite(value):
        return str(value)
    if kind == "megabytes":
        value, kind = value / 1e6, "count"
    if kind == "bytes" and value == int(value):
        kind = "count"
    formats = {"count": ",.0f", "bytes": ",.4g", "loss": ".3f", "ratio": ".3f", "percent": ".1%", "seconds": ",.0f"}
    return compact(value) if kind == "compact" else format(value, formats[kind])


def spread(value: Spread | None, kind: str) -> str:
    """mean ± sd, or the one value there is."""
    if value is None:
        return UNKNOWN
    return shown(value.mean, kind) + (f" ± {shown(value.sd, kind)}" if value.sd else "")


def finite(value: Any) -> Any:
    """For strict JSON: a number that is not finite is null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
