"""`cost`: what models store, read and compute, side by side."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from typing import Any

from conf import schema
from conf.schema import Refused
from models import cost
from models.commands.named import named
from models.commands.overview import count
from models.contract import BYTES
from models.gpu import GPUS, Gpu
from models.model import Model

LIMIT = 2**40
"""Contexts are not searched beyond it: a cache that does not grow would fit any."""

Costs = dict[str, Any]


def run(arguments: argparse.Namespace) -> None:
    """Print the costs of the models, as tables or as one JSON object by name."""
    contexts = _contexts(arguments.context)
    if arguments.weights is not None and arguments.gpu is None:
        raise Refused("--weights says how weights lie on a GPU; give --gpu too, or leave it out.")
    gpus = None if arguments.gpu is None else _gpus(arguments.gpu)
    weight_bytes = _format_bytes(arguments.weights or "bf16")
    models = {found.name: cost.meta(found.config) for found in named(arguments.model)}
    costs = {name: costs_of(model, contexts, packed=arguments.packed) for name, model in models.items()}
    if gpus is not None:
        number, gpu = gpus
        for name, model in models.items():
            fits = fitting(model, contexts, number * gpu.memory, weight_bytes, packed=arguments.packed)
            costs[name]["gpu"] = {"name": arguments.gpu, **fits, **against_ridge(costs[name], gpu)}
    if arguments.baseline is not None:
        baseline = _baseline(arguments.baseline, costs, contexts, packed=arguments.packed)
        for name in costs:
            costs[name]["percent_of_baseline"] = percents(costs[name], baseline)
    print(json.dumps(costs, indent=2) if arguments.json else tables(costs, contexts))


def costs_of(model: Model, contexts: list[int], *, packed: bool) -> Costs:
    """Parameters, bytes (in the formats that the slots declare, or as packed) and operations; by context where they
    depend on it.

    naive: of the cache, as an engine without windows holds it.
    """
    size = cost.parameters(model)
    cache = {str(tokens): cost.kv_bytes(model, tokens, packed=packed) for tokens in contexts}
    return {
        "total": size.total,
        "active": size.active,
        "looked_up": size.looked_up,
        "kv_bytes_per_token": _whole(cost.kv_bytes_per_token(model, packed=packed)),
        "kv_bytes": {tokens: _whole(held["total"]) for tokens, held in cache.items()},
        "kv_bytes_by_kind": {
            tokens: {kind: _whole(number) for kind, number in held.items() if kind != "total"}
            for tokens, held in cache.items()
        },
        "naive_kv_bytes_per_token": _whole(cost.kv_bytes_per_token(model, naive=True, packed=packed)),
        "naive_kv_bytes": {
            str(n): _whole(cost.kv_bytes(model, n, naive=True, packed=packed)["total"]) for n in contexts
        },
        "growth_exponent": round(cost.growth_exponent(model), 3),
        "flop_per_byte": {str(n): round(cost.flop_per_byte(model, n, packed=packed), 3) for n in contexts},
        "read_bytes_per_step": {str(n): _whole(cost.read_bytes_per_step(model, n, packed=packed)) for n in contexts},
        "decode_flops": {str(n): _whole(cost.flops(model, 1, n).total) for n in contexts},
        "prefill_flops": {str(n): _whole(cost.flops(model, n, n).total) for n in contexts},
    }


def fitting(model: Model, contexts: list[int], memory: float, weight_bytes: float, *, packed: bool) -> Costs:
    """What the memory holds beside the weights: the longest context of one session, and sessions of each context.

    Activations and the engine's own needs are not subtracted.
    """
    weights = sum(parameter.numel() for parameter in model.parameters()) * weight_bytes
    left = memory - weights

    def held(tokens: int) -> float:
        return cost.kv_bytes(model, tokens, packed=packed)["total"]

    def fits(tokens: int) -> bool:
        return held(tokens) <= left

    longest, beyond = 0, LIMIT + 1
    while left > 0 and beyond - longest > 1:
        middle = (longest + beyond) // 2
        longest, beyond = (middle, beyond) if fits(middle) else (longest, middle)
    sessions = {str(n): max(0, int(left // size)) if (size := held(n)) else None for n in contexts}
    return {
        "memory_bytes": _whole(memory),
        "weight_bytes": _whole(weights),
        "longest_context": longest,
        "sessions": sessions,
    }


def against_ridge(costs: Costs, gpu: Gpu) -> Costs:
    """By context, what reading the cache waits for: the GPU's `memory`, or its `compute`."""
    sides = {n: "compute" if found > gpu.ridge else "memory" for n, found in costs["flop_per_byte"].items()}
    return {"ridge": round(gpu.ridge, 1), "bound": sides}


def percents(costs: Costs, baseline: Costs) -> Costs:
    """Each number as a percentage of the baseline's; None where that is 0."""
    result: Costs = {}
    for key, value in costs.items():
        if isinstance(value, Mapping):
            if key not in ("gpu", "kv_bytes_by_kind"):
                result[key] = percents(dict(value), baseline[key])
        else:
            result[key] = round(100 * value / baseline[key], 3) if baseline[key] else None
    return result


def tables(costs: Mapping[str, Costs], contexts: list[int]) -> str:
    """The same for people."""
    width = max(len(name) for name in costs)
    percent = any("percent_of_baseline" in entry for entry in costs.values())

    def cell(entry: Costs, key: str, show: Any, context: str | None = None) -> str:
        value = entry[key] if context is None else entry[key][context]
        if not percent:
            return f"{show(value):>13}"
        share = entry["percent_of_baseline"][key]
        share = share if context is None else share[context]
        return f"{show(value):>13}" + (f" {share:6.1f}%" if share is not None else " " * 8)

    def header(*titles: str) -> str:
        return " " * width + "".join(f"{title:>13}" + " " * (8 if percent else 0) for title in titles)

    lines = [header("total", "active", "KV / token")]
    for name, entry in costs.items():
        shown = [cell(entry, "total", count), cell(entry, "active", count), cell(entry, "kv_bytes_per_token", _bytes)]
        lines.append(f"{name:{width}}" + "".join(shown))
    for context in map(str, contexts):
        lines += [
            "",
            f"{int(context):,} tokens of context",
            header("KV cache", "naive cache", "read / step", "FLOP / byte", "decode FLOP", "prefill FLOP"),
        ]
        for name, entry in costs.items():
            shown = [cell(entry, key, _bytes, context) for key in ("kv_bytes", "naive_kv_bytes", "read_bytes_per_step")]
            shown += [cell(entry, "flop_per_byte", _plain, context)]
            shown += [cell(entry, key, _flops, context) for key in ("decode_flops", "prefill_flops")]
            lines.append(f"{name:{width}}" + "".join(shown))
    for name, entry in costs.items():
        if gpu := entry.get("gpu"):
            lines += ["", _fit_words(name, gpu)]
    return "\n".join(lines)


def _fit_words(name: str, gpu: Costs) -> str:
    if gpu["weight_bytes"] >= gpu["memory_bytes"]:
        return f"{name}: {_bytes(gpu['weight_bytes'])} of weights do not fit {gpu['name']}"
    sessions = ", ".join(f"{number} of {int(context):,}" for context, number in gpu["sessions"].items())
    longest = "any length" if gpu["longest_context"] >= LIMIT else f"{gpu['longest_context']:,} tokens"
    bounds = ", ".join(f"{bound} at {int(context):,}" for context, bound in gpu["bound"].items())
    return (
        f"{name} on {gpu['name']}, beside {_bytes(gpu['weight_bytes'])} of weights: "
        f"longest context {longest}; sessions: {sessions}; "
        f"reading the cache is bound by {bounds} (ridge {gpu['ridge']:g} FLOP a byte)"
    )


def _baseline(words: str, costs: Mapping[str, Costs], contexts: list[int], *, packed: bool) -> Costs:
    if words in costs:
        return costs[words]
    found = named(words.split())
    if len(found) != 1:
        raise Refused(f"--baseline is '{words}', but it takes one model.")
    return costs_of(cost.meta(found[0].config), contexts, packed=packed)


def _contexts(text: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise Refused(
            f"--context is '{text}', but whole numbers of tokens with commas between are needed: 4096,131072."
        )
    return list(dict.fromkeys(map(int, text.split(","))))


def _gpus(text: str) -> tuple[int, Gpu]:
    number, _, name = text.rpartition("x") if re.match(r"\d+x", text) else ("1", "", text)
    if name not in GPUS:
        raise Refused(schema.unknown_choice("--gpu", name, list(GPUS)))
    return int(number), GPUS[name]


def _format_bytes(name: str) -> float:
    if name not in BYTES:
        raise Refused(schema.unknown_choice("--weights", name, list(BYTES)))
    return BYTES[name]


def _whole(number: float) -> int | float:
    return int(number) if float(number).is_integer() else number


def _bytes(number: float) -> str:
    """Decimal units, as the makers of memory count."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:g} B"


def _plain(number: float) -> str:
    return f"{number:.1f}"


def _flops(number: float) -> str:
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f}"
