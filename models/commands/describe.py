"""`describe`: a model layer by layer, and what its tokens leave behind."""

from __future__ import annotations

import argparse
import dataclasses
import json
import textwrap
from itertools import groupby
from typing import Any

from conf.schema import Refused
from models import cost
from models.commands.named import Named, named
from models.commands.overview import count
from models.config import Layer, LayerPlan, ModelConfig, resolve, resolve_mtp
from models.contract import Slot
from models.model import Model


def run(arguments: argparse.Namespace) -> None:
    """Print one model."""
    found = named(arguments.model)
    if len(found) != 1:
        raise Refused("describe takes one model; `cost` compares several.")
    model = cost.meta(found[0].config)
    print(json.dumps(as_mapping(found[0], model), indent=2) if arguments.json else picture(found[0], model))


def as_mapping(found: Named, model: Model) -> dict[str, Any]:
    """Everything that a serving engine needs to lay out the cache: every layer with its slots."""
    config, size = found.config, cost.parameters(model)
    return {
        "name": found.name,
        "vocab": config.vocab,
        "width": config.width,
        "tied": config.tied,
        "positions": config.positions,
        "norm": config.norm,
        "norm_eps": config.norm_eps,
        "post_norm": config.post_norm,
        "block_scale": config.block_scale,
        "embedding_scale": config.embedding_scale,
        "logit_cap": config.logit_cap,
        "residual": dict(config.residual),
        "total": size.total,
        "active": size.active,
        "kv_bytes_per_token": cost.kv_bytes_per_token(model),
        "layers": _layers(model),
        "mtp": _mtp(model),
    }


def picture(found: Named, model: Model) -> str:
    """Runs of equal layers, with what each leaves in the cache."""
    config, size = found.config, cost.parameters(model)
    head = "tied to the embedding" if config.tied else "of its own"
    lines = [
        f"{found.name}: {count(size.total)} parameters, {count(size.active)} active",
        f"vocabulary {config.vocab}, width {config.width}, head {head}, residual {config.residual['scheme']}",
        *_around(config),
        f"cache grows by {cost.kv_bytes_per_token(model):,.0f} bytes a token",
    ]
    for _, same in groupby(
        _layers(model), key=lambda layer: {**layer, "layer": None, "reads": layer["reads"] - layer["layer"]}
    ):
        depths = list(same)
        first, last = depths[0], depths[-1]
        span = f"layer {first['layer']}" if len(depths) == 1 else f"layers {first['layer']}–{last['layer']}"
        lines += ["", f"{span}  ×{len(depths)}", _wrapped("attention", first["attention"])]
        if first["stands_alone"]:
            lines += ["    reads      what a writer leaves that stands alone, before the attention"]
        if first["writes"]:
            lines += [f"    leaves     {_slot_words(slot)}" for slot in first["slots"]]
        else:
            lines += [f"    reads      what layer {first['reads']} left; leaves nothing"]
        lines += [_wrapped(name, first[name]) for name in ("feedforward", "injection") if name in first]
    if (mtp := _mtp(model)) is not None:
        module = "one module" if mtp["modules"] == 1 else f"{mtp['modules']} modules"
        further = "1 token" if mtp["depth"] == 1 else f"{mtp['depth']} tokens"
        head = f"multi-token prediction, in training alone: {further} further by {module}, {mtp['scheme']}, "
        lines += ["", head + f"{count(size.mtp)} parameters"]
        lines += [_wrapped(name, mtp[name]) for name in ("attention", "feedforward")]
    return "\n".join(lines)


def _around(config: ModelConfig) -> list[str]:
    """What is not as most models have it, on a line."""
    words = []
    if config.positions is not None:
        words.append(f"learned positions for {config.positions} tokens, added to the embedding")
    if config.embedding_scale != 1.0:
        words.append(f"embedding times {config.embedding_scale:g}")
    if config.norm == "layer":
        words.append("layer norms")
    if config.post_norm:
        words.append("a norm after each sublayer too")
    if config.block_scale:
        words.append("each layer scaled")
    if config.logit_cap is not None:
        words.append(f"logits within ± {config.logit_cap:g}")
    return [", ".join(words)] if words else []


def _layers(model: Model) -> list[dict[str, Any]]:
    plans = [plan for stack in model.config.layers for _ in range(stack.repeat) for plan in stack.of]
    return [
        {
            "layer": sublayer.layer,
            "reads": sublayer.writer,
            "writes": sublayer.writes,
            "stands_alone": sublayer.alone is not None,
            "attention": {"scheme": plan.attention["scheme"], **dataclasses.asdict(layer.attention)},
            "feedforward": {"scheme": plan.feedforward["scheme"], **dataclasses.asdict(layer.feedforward)},
            **_injection(plan, layer),
            "slots": [_slot(slot) for slot in sublayer.attention.slots()],
        }
        for plan, layer, sublayer in zip(plans, resolve(model.config), model.attention_sublayers(), strict=True)
    ]


def _mtp(model: Model) -> dict[str, Any] | None:
    """What training adds; it leaves nothing in the cache."""
    found = resolve_mtp(model.config)
    if found is None or model.config.mtp is None:
        return None
    scheme, layer = found
    return {
        "scheme": model.config.mtp["scheme"],
        "depth": scheme.depth,
        "modules": scheme.modules,
        "attention": {"scheme": scheme.layer.attention["scheme"], **dataclasses.asdict(layer.attention)},
        "feedforward": {"scheme": scheme.layer.feedforward["scheme"], **dataclasses.asdict(layer.feedforward)},
        "parameters": cost.parameters(model).mtp,
    }


def _injection(plan: LayerPlan, layer: Layer) -> dict[str, Any]:
    if plan.injection is None:
        return {}
    return {"injection": {"scheme": plan.injection["scheme"], **dataclasses.asdict(layer.injection)}}


def _slot(slot: Slot) -> dict[str, Any]:
    parts = [{**dataclasses.asdict(part), "dims": dict(part.dims)} for part in slot.parts]
    return {**dataclasses.asdict(slot), "parts": parts, "entry_bytes": cost.AS_DECLARED.bytes(slot)}


def _wrapped(name: str, values: dict[str, Any]) -> str:
    given = ", ".join(f"{key} {_value(value)}" for key, value in values.items() if key != "scheme" and value)
    text = f"  {name:12} {values['scheme']:6} {given}"
    return textwrap.fill(text, 110, subsequent_indent=" " * 22, break_on_hyphens=False)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_value(held)}" for key, held in value.items() if held) + ")"
    return "yes" if value is True else f"{value:g}" if isinstance(value, float) else str(value)


def _slot_words(slot: dict[str, Any]) -> str:
    parts = " + ".join(f"{part['name']} {list(part['dims'].values())} {part['format']}" for part in slot["parts"])
    if slot["kind"] == "tail":
        return f"{slot['name']}: {parts}, {slot['entry_bytes']:,.0f} bytes a row, the last {slot['rows']} rows"
    every = "a token" if slot["stride"] == 1 else f"for each {slot['stride']} tokens"
    if slot["span"] > slot["stride"]:
        every += f", made of {slot['span']}"
    if slot["limit"] is not None:
        every += f", the first {slot['limit']}"
    if slot["beyond"]:
        every += f", read from {slot['beyond']} tokens back on"
    if slot["reach"] is not None:
        every += f", read {slot['reach']} tokens back"
    if slot["chosen"] is not None:
        every += f", {slot['chosen']} read at most"
    return f"{slot['name']}: {parts}, {slot['entry_bytes']:,.0f} bytes {every}"
