"""Cores for training alone, which read less than all; evaluation and decode read with an exact one.

`scheme: x` in train.approximate is the file `x.py` here. Its `Config` has `core`, with the signature of models.cores,
and says in `dense` which layers keep an exact core.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conf.schema import Refused
from models import mechanism
from models.contract import Attention, Slot
from models.cores.merge import Core
from models.parameter import named_specs

WHERE = "train.approximate"


def config_of(values: Mapping[str, Any]) -> Any:
    """The `Config` that `values` describe. Raises Refused."""
    return mechanism.config_of("cores.approximate", values, WHERE)


def cores(values: Mapping[str, Any] | None, attentions: list[Attention]) -> list[tuple[Attention, Core]]:
    """The schemes that are trained with another core, and that core. attentions: of a model, in order of depth.

    Raises Refused for a layer that is no plain softmax attention, unless it stays dense.
    """
    if values is None:
        return []
    config, depths = config_of(values), range(len(attentions))
    if beyond := [layer for layer in config.dense if layer not in range(-len(attentions), len(attentions))]:
        raise Refused(f"{WHERE}.dense names layer {beyond[0]}, but the model has {len(attentions)} layers.")
    dense = {depths[layer] for layer in config.dense}
    changed = [layer for layer in depths if layer not in dense]
    if not changed:
        raise Refused(f"{WHERE}.dense names every layer, so that nothing is left to approximate; leave it null.")
    for layer in changed:
        if not is_plain(attentions[layer]):
            raise Refused(
                f"{WHERE} needs layers that read whole rows of tokens in one softmax, but layer {layer} has a window, "
                f"compressed blocks, an indexer or a sink; add it to {WHERE}.dense, which keeps its core."
            )
    return [(attentions[layer], config.core) for layer in changed]


def is_plain(attention: Attention) -> bool:
    """Whether all that is read is one entry a token, back to the start, in one softmax."""
    entries = [slot for slot in attention.slots() if slot.kind == "entry"]
    plain = len(entries) == 1 and all(map(_is_whole, entries))
    return plain and all(spec.role != "sink" for _, _, spec in named_specs(attention))


def _is_whole(slot: Slot) -> bool:
    return slot.stride == slot.span == 1 and slot.reach is None and slot.chosen is None
