"""What a model costs, from what its mechanisms declare: parameters, cache bytes, bytes read, floating-point
operations."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import linear_regression

import torch

from models.cache import Cache
from models.config import ModelConfig
from models.contract import BYTES, Flops, PairCount, Slot, visible_pairs
from models.model import Model
from models.parameter import named_specs


@dataclass(frozen=True)
class Parameters:
    """total: all. active: that one token is multiplied by, the head included. looked_up: rows of tables, of which a
    token takes one each; a tied embedding is the head."""

    total: int
    active: int
    looked_up: int


def meta(config: ModelConfig) -> Model:
    """The model without memory."""
    with torch.device("meta"):
        return Model(config)


def parameters(model: Model) -> Parameters:
    """Counted on the model as it is built; routed experts count as active by top_k of E."""
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = sum(feedforward.idle() for feedforward in model.feedforwards())
    looked_up = sum(p.numel() for _, p, spec in named_specs(model) if spec.role == "embedding")
    if model.config.tied:
        looked_up -= model.embedding.weight.numel()
    return Parameters(total, total - idle - looked_up, looked_up)


def slot_bytes(slot: Slot, *, packed: bool = False) -> float:
    """Stored bytes of one entry, or of one row of a tail. packed: as the kernels of the scheme's authors store it."""
    layouts = [(packed and part.packed) or ((part.format, part.numbers),) for part in slot.parts]
    return sum(BYTES[number_format] * numbers for layout in layouts for number_format, numbers in layout)


def written_slots(model: Model, *, naive: bool = False) -> list[Slot]:
    """The slots of every layer that writes a state of its own.

    naive: as an engine without windows holds them, which keeps every entry though none beyond its reach is read.
    """
    slots = [slot for attention in model.attentions() if attention.writes for slot in attention.slots()]
    return [replace(slot, reach=None) for slot in slots] if naive else slots


def kv_bytes_per_token(model: Model, *, naive: bool = False, packed: bool = False) -> float:
    """Bytes by which the cache grows with each further token: entries read without a limit. Windows and tails do not
    grow. naive: see written_slots; packed: see slot_bytes."""
    growing = [s for s in written_slots(model, naive=naive) if s.kind == "entry" and s.reach is None]
    return sum(slot_bytes(slot, packed=packed) / slot.stride for slot in growing)


def kv_bytes(model: Model, context: int, *, naive: bool = False, packed: bool = False) -> dict[str, float]:
    """Cache bytes of one sequence of `context` tokens: `entries`, `windows` and `tails` apart, and their `total`.

    naive: see written_slots; packed: see slot_bytes.
    """
    total = {"entries": 0.0, "windows": 0.0, "tails": 0.0}
    for slot in written_slots(model, naive=naive):
        kind = "tails" if slot.kind == "tail" else "entries" if slot.reach is None else "windows"
        total[kind] += slot.entries(context) * slot_bytes(slot, packed=packed)
    return total | {"total": sum(total.values())}


def read_bytes_per_step(model: Model, context: int, *, packed: bool = False) -> float:
    """Cache bytes that one decode step reads: every reader its state, also a shared one."""
    slots = [slot for attention in model.attentions() for slot in attention.slots() if slot.kind == "entry"]
    return sum(visible_pairs(slot, 1, context) * slot_bytes(slot, packed=packed) for slot in slots)


def flop_per_byte(model: Model, context: int, *, packed: bool = False) -> float:
    """Operations on what one decode step reads of the cache, selecting and scoring, for each byte of it."""
    step = flops(model, 1, context)
    read = read_bytes_per_step(model, context, packed=packed)
    return (step.scores + step.selection) / read if read else 0.0


def growth_exponent(model: Model) -> float:
    """p, where the bytes that a cache allocates grow as tokensᵖ: fitted to 4,096 … 262,144 tokens of one sequence."""
    contexts = [2**n for n in range(12, 19)]
    allocated = [sum(Cache(model, 1, tokens, "meta").num_bytes().values()) for tokens in contexts]
    return linear_regression([math.log(n) for n in contexts], [math.log(held) for held in allocated]).slope


def flops(model: Model, queries: int, context: int, pairs: PairCount = visible_pairs) -> Flops:
    """Forward operations of the last `queries` tokens of one document of `context` tokens, the head included."""
    total = Flops(projections=queries * 2.0 * model.config.width * model.config.vocab)
    for attention in model.attentions():
        total += attention.flops(queries, context, pairs)
    for part in [*model.feedforwards(), *model.residuals(), model.ends]:
        total += Flops(projections=queries * part.flops())
    return total
