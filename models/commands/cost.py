"""`cost`: what models store, read and compute, side by side."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from conf import schema
from conf.schema import Refused
from models import cost, storage
from models.commands.cost_tables import tables
from models.commands.named import named
from models.contract import BYTES
from models.gpu import GPUS, Gpu
from models.model import Model
from models.storage import Storage

Costs = dict[str, Any]


def run(arguments: argparse.Namespace) -> None:
    """Print the costs of the models, as tables or as one JSON object by name."""
    contexts = _contexts(arguments.context)
    gpus = None if arguments.gpu is None else _gpus(arguments.gpu)
    weights = arguments.weights
    if weights not in BYTES:
        raise Refused(schema.unknown_choice("--weights", weights, list(BYTES)))
    models = {found.name: cost.meta(found.config) for found in named(arguments.model)}
    baseline = None if arguments.baseline is None else _baseline(arguments.baseline, models)
    store = _storage(arguments.store, [*models.values(), *([] if baseline is None else [baseline])])
    costs = {name: costs_of(model, contexts, store, weights) for name, model in models.items()}
    if baseline is not None:
        base = costs_of(baseline, contexts, store, weights)
        for name in costs:
            costs[name]["percent_of_baseline"] = percents(costs[name], base)
    if gpus is not None:
        number, gpu = gpus
        for name, model in models.items():
            fits = fitting(model, contexts, number * gpu.memory, store, weights)
            costs[name]["gpu"] = {"name": arguments.gpu, **fits, **against_ridge(costs[name], gpu)}
    print(json.dumps(costs, indent=2) if arguments.json else tables(costs, contexts))


def costs_of(model: Model, contexts: list[int], store: Storage, weights: str) -> Costs:
    """Parameters, bytes in the formats of `store` and operations; by context where they depend on it.

    kv_bytes: of what queries read; tail_bytes: of what compressions still need, apart. naive: as an engine without
    windows holds it. sharing_saves: what the layers that read another's state would hold of their own.
    total_with_mtp: with multi-token prediction, which is in nothing else.
    decode and prefill FLOPs count every operation once; weighted ones are in bf16's, see models.cost.weighted.
    """
    size = cost.parameters(model)

    def by_context(value: Callable[[int], float]) -> dict[str, int | float]:
        return {str(tokens): _whole(value(tokens)) for tokens in contexts}

    def cache(tokens: int, *, naive: bool = False, shared: bool = True) -> float:
        held = cost.kv_bytes(model, tokens, store, naive=naive, shared=shared)
        return held["entries"] + held["windows"]

    def saved(tokens: int, *, naive: bool) -> float:
        return cache(tokens, naive=naive, shared=False) - cache(tokens, naive=naive)

    return {
        "total": size.total,
        "total_with_mtp": size.total + size.mtp,
        "active": size.active,
        "looked_up": size.looked_up,
        "total_by_part": cost.parameters_by_part(model),
        "kv_bytes_per_token": _whole(cost.kv_bytes_per_token(model, store)),
        "kv_bytes": by_context(cache),
        "tail_bytes": by_context(lambda n: cost.kv_bytes(model, n, store)["tails"]),
        "kv_bytes_by_kind": {
            str(n): {kind: _whole(held) for kind, held in cost.kv_bytes(model, n, store).items() if kind != "total"}
            for n in contexts
        },
        "sharing_saves": by_context(lambda n: saved(n, naive=False)),
        "naive_kv_bytes_per_token": _whole(cost.kv_bytes_per_token(model, store, naive=True)),
        "naive_kv_bytes": by_context(lambda n: cache(n, naive=True)),
        "naive_sharing_saves": by_context(lambda n: saved(n, naive=True)),
        "growth_exponent": round(cost.growth_exponent(model), 3),
        "flop_per_byte": by_context(lambda n: round(cost.flop_per_byte(model, n, store), 3)),
        "read_bytes_per_step": by_context(lambda n: cost.read_bytes_per_step(model, n, store)),
        "decode_flops": by_context(lambda n: cost.flops(model, 1, n).total),
        "prefill_flops": by_context(lambda n: cost.flops(model, n, n).total),
        "weighted_decode_flops": by_context(lambda n: cost.weighted(model, 1, n, store, weights).total),
        "weighted_prefill_flops": by_context(lambda n: cost.weighted(model, n, n, store, weights).total),
    }


def fitting(model: Model, contexts: list[int], memory: float, store: Storage, weights: str) -> Costs:
    """What the memory holds beside the weights: the longest context of one session, and sessions of each context, none
    of a longer one.

    Activations and the engine's own needs are not subtracted.
    """
    weight_bytes = cost.parameters(model).total * BYTES[weights]
    left = memory - weight_bytes
    longest = cost.longest_context(model, left, store)
    held = {n: cost.kv_bytes(model, n, store)["total"] for n in contexts}
    sessions = {str(n): (int(left // held[n]) if held[n] else None) if n <= longest else 0 for n in contexts}
    return {
        "memory_bytes": _whole(memory),
        "weight_bytes": _whole(weight_bytes),
        "longest_context": longest,
        "unbounded": longest >= cost.LIMIT,
        "sessions": sessions,
    }


def against_ridge(costs: Costs, gpu: Gpu) -> Costs:
    """By context, what reading the cache waits for: the GPU's `memory`, or its `compute`."""
    sides = {n: "compute" if found > gpu.ridge else "memory" for n, found in costs["flop_per_byte"].items()}
    return {"ridge": round(gpu.ridge, 1), "bound": sides}


def percents(costs: Costs, baseline: Costs) -> Costs:
    """Each number as a percentage of the baseline's; None where that is 0, or the baseline has no such part."""
    result: Costs = {}
    for key, value in costs.items():
        base = baseline.get(key)
        if isinstance(value, Mapping):
            result[key] = percents(dict(value), base or {})
        else:
            result[key] = round(100 * value / base, 3) if base else None
    return result


def _baseline(words: str, models: Mapping[str, Model]) -> Model:
    if words in models:
        return models[words]
    found = named(words.split())
    if len(found) != 1:
        raise Refused(f"--baseline is '{words}', but it takes one model.")
    return cost.meta(found[0].config)


def _storage(text: str, models: list[Model]) -> Storage:
    """`packed,index=fp8`: a format for all entries, and others for what is named."""
    known = storage.names(slot for model in models for slot in cost.written_slots(model))
    entries, asked = storage.DECLARED, {}
    for item in text.split(","):
        name, named_one, number_format = item.rpartition("=")
        if number_format not in storage.FORMATS:
            raise Refused(schema.unknown_choice("--store", number_format, list(storage.FORMATS)))
        if not named_one:
            entries = number_format
        elif name not in known:
            raise Refused(schema.unknown_choice("--store", name, known))
        else:
            asked[name] = number_format
    return Storage(entries, asked)


def _contexts(text: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise Refused(
            f"--context is '{text}', but whole numbers of tokens with commas between are needed: 4096,131072."
        )
    return list(dict.fromkeys(map(int, text.split(","))))


def _gpus(text: str) -> tuple[int, Gpu]:
    number, _, name = text.rpartition("x") if re.match(r"\d+x", text) else ("1", "", text)
    if name not in GPUS or int(number) < 1:
        raise Refused(schema.unknown_choice("--gpu", name if int(number) else text, list(GPUS)))
    return int(number), GPUS[name]


def _whole(number: float) -> int | float:
    return int(number) if float(number).is_integer() else number
