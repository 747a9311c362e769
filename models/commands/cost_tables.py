"""What `cost` found, as tables for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from models.commands.overview import count

Costs = Mapping[str, Any]
Column = tuple[str, str, Callable[[float], str]]
"""(title, key of the costs, how a number is written)."""


def tables(costs: Mapping[str, Costs], contexts: list[int]) -> str:
    """Sizes, one table a context, and what fits the GPU. Columns that would hold nothing new are left out."""
    sizes: list[Column] = [("total", "total", count)]
    sizes += [("with MTP", "total_with_mtp", count)] if _has_mtp(costs) else []
    sizes += [("active", "active", count)]
    sizes += [("looked up", "looked_up", count)] if _any(costs, "looked_up") else []
    sizes += [("KV / token", "kv_bytes_per_token", size)]
    lines = _table(costs, sizes, None)
    parts = list(dict.fromkeys(part for entry in costs.values() for part in entry["total_by_part"]))
    of_total: list[Column] = [(part, f"total_by_part.{part}", count) for part in parts]
    lines += ["", "of the total", *_table(costs, of_total, None)]
    for context in map(str, contexts):
        lines += ["", f"{int(context):,} tokens of context", *_table(costs, _columns(costs, context), context)]
    for name, entry in costs.items():
        if gpu := entry.get("gpu"):
            lines += ["", _fit_words(name, gpu)]
    return "\n".join(lines)


def _columns(costs: Mapping[str, Costs], context: str) -> list[Column]:
    tails = any(entry["tail_bytes"][context] for entry in costs.values())
    shares = any(entry["naive_sharing_saves"][context] for entry in costs.values())
    weighs = any(entry["weighted_decode_flops"] != entry["decode_flops"] for entry in costs.values())
    return [
        ("KV cache", "kv_bytes", size),
        *([("tails", "tail_bytes", size)] if tails else []),
        *([("sharing saves", "sharing_saves", size)] if shares else []),
        ("naive cache", "naive_kv_bytes", size),
        *([("sharing saves", "naive_sharing_saves", size)] if shares else []),
        ("read / step", "read_bytes_per_step", size),
        ("FLOP / byte", "flop_per_byte", lambda number: f"{number:.1f}"),
        ("decode FLOP", "decode_flops", _flops),
        *([("in bf16's", "weighted_decode_flops", _flops)] if weighs else []),
        ("prefill FLOP", "prefill_flops", _flops),
        *([("in bf16's", "weighted_prefill_flops", _flops)] if weighs else []),
    ]


def _table(costs: Mapping[str, Costs], columns: list[Column], context: str | None) -> list[str]:
    """A row a model; with percents of the baseline, if there is one."""
    width, percent = max(len(name) for name in costs), any("percent_of_baseline" in entry for entry in costs.values())

    def found(entry: Costs, key: str) -> float | None:
        value: Any = entry
        for step in [*key.split("."), *([] if context is None else [context])]:
            value = value.get(step) if value is not None else None
        return value

    def cell(entry: Costs, key: str, show: Callable[[float], str]) -> str:
        value = found(entry, key)
        text = f"{'–' if value is None else show(value):>14}"
        if not percent:
            return text
        share = found(entry["percent_of_baseline"], key)
        return text + (f" {share:7.2f}%" if share is not None else " " * 9)

    header = " " * width + "".join(f"{title:>14}" + " " * (9 if percent else 0) for title, _, _ in columns)
    rows = [
        f"{name:{width}}" + "".join(cell(entry, key, show) for _, key, show in columns) for name, entry in costs.items()
    ]
    return [header.rstrip(), *(row.rstrip() for row in rows)]


def _has_mtp(costs: Mapping[str, Costs]) -> bool:
    return any(entry["total_with_mtp"] != entry["total"] for entry in costs.values())


def _any(costs: Mapping[str, Costs], key: str) -> bool:
    return any(entry[key] for entry in costs.values())


def _fit_words(name: str, gpu: Costs) -> str:
    bounds = ", ".join(f"{bound} at {int(context):,}" for context, bound in gpu["bound"].items())
    ridge = f"reading the cache is bound by {bounds} (ridge {gpu['ridge']:g} FLOP a byte)"
    if gpu["weight_bytes"] >= gpu["memory_bytes"]:
        return f"{name}: {size(gpu['weight_bytes'])} of weights do not fit {gpu['name']}; {ridge}"
    sessions = ", ".join(f"{number} of {int(context):,}" for context, number in gpu["sessions"].items())
    longest = "any length" if gpu["unbounded"] else f"{gpu['longest_context']:,} tokens"
    return (
        f"{name} on {gpu['name']}, beside {size(gpu['weight_bytes'])} of weights: "
        f"longest context {longest}; sessions: {sessions}; {ridge}"
    )


def size(number: float) -> str:
    """Bytes in decimal units, as the makers of memory count."""
    for unit, many in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= many:
            return f"{number / many:.2f} {unit}"
    return f"{number:g} B"


def _flops(number: float) -> str:
    for unit, many in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= many:
            return f"{number / many:.1f} {unit}"
    return f"{number:.0f}"
