"""What a model costs, from what its mechanisms declare: parameters, cache bytes, bytes read, floating-point
operations.

`store` says in which formats the cache is stored, everywhere: as declared, unless something else is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import linear_regression

import torch
from torch import nn

from models.ahead import Prediction
from models.block import AttentionSublayer, FeedForwardSublayer
from models.cache import Cache
from models.config import ModelConfig
from models.contract import BYTES, Attention, FeedForward, Flops, PairCount, Slot, visible_pairs
from models.model import Model
from models.parameter import named_specs
from models.storage import DECLARED, Storage

AS_DECLARED = Storage(DECLARED)

LIMIT = 2**40
"""Contexts are not searched beyond it: a cache that does not grow would fit any."""


@dataclass(frozen=True)
class Parameters:
    """total: all but mtp, which is what multi-token prediction adds for training. active: that one token is multiplied
    by, the head included. looked_up: rows of tables, of which a token takes one each; a tied embedding is the head."""

    total: int
    active: int
    looked_up: int
    mtp: int = 0


def meta(config: ModelConfig) -> Model:
    """The model without memory."""
    with torch.device("meta"):
        return Model(config)


def parameters(model: Model) -> Parameters:
    """Counted on the model as it is built; routed experts count as active by top_k of E."""
    mtp = sum(parameter.numel() for parameter in model.mtp.parameters())
    total = sum(parameter.numel() for parameter in model.parameters()) - mtp
    idle = sum(feedforward.idle() for feedforward in model.feedforwards())
    looked_up = sum(p.numel() for _, p, spec in named_specs(model) if spec.role == "embedding")
    if model.config.tied:
        looked_up -= model.embedding.weight.numel()
    return Parameters(total, total - idle - looked_up, looked_up, mtp)


def parameters_by_part(model: Model) -> dict[str, int]:
    """The total, by what it belongs to: a kind of sublayer by its name, of which experts and routers are told apart;
    `norms` stand between the parts, a layer's scale among them."""
    owners: dict[str, list[nn.Module | None]] = {
        "embedding": [model.embedding],
        "positions": [model.positions],
        "injection": [*model.preambles],
        "residual": [*model.residuals(), model.ends],
        "head": [model.head],
    }
    for block in model.depths():
        for name, sublayer in block.named_children():
            mechanisms = [part for part in sublayer.modules() if isinstance(part, Attention | FeedForward)]
            owners.setdefault(name, []).extend(mechanisms)
    owner = {
        id(parameter): part
        for part, modules in owners.items()
        for module in modules
        if module is not None
        for parameter in module.parameters()
    }
    by_role = {"router": "routers", "expert": "experts", "expert_output": "experts"}
    total = dict.fromkeys(("embedding", "attention", "routers", "experts", "feedforward", *owners, "norms"), 0)
    further = {id(parameter) for parameter in model.mtp.parameters()}
    for _, parameter, spec in named_specs(model):
        if id(parameter) in further:
            continue
        total[by_role.get(spec.role, owner.get(id(parameter), "norms"))] += parameter.numel()
    return {part: number for part, number in total.items() if number}


def written_slots(model: Model, *, naive: bool = False, shared: bool = True) -> list[Slot]:
    """The slots of every layer that writes a state of its own.

    naive: as an engine without windows holds them, which keeps every entry though none beyond its reach is read; and so
    needs no slot for what is read beyond a window. shared: False for the slots of every layer, as if none read
    another's state.
    """
    writers = [layer.attention for layer in model.attention_sublayers() if layer.writes or not shared]
    slots = [slot for attention in writers for slot in attention.slots()]
    return [replace(slot, reach=None) for slot in slots if not slot.beyond] if naive else slots


def kv_bytes_per_token(model: Model, store: Storage = AS_DECLARED, *, naive: bool = False) -> float:
    """Bytes by which the cache grows with each further token: entries without a bound. Windows and tails do not
    grow. naive: see written_slots."""
    growing = [slot for slot in written_slots(model, naive=naive) if slot.grows]
    return sum(store.bytes(slot) / slot.stride for slot in growing)


def kv_bytes(
    model: Model, context: int, store: Storage = AS_DECLARED, *, naive: bool = False, shared: bool = True
) -> dict[str, float]:
    """Cache bytes of one sequence of `context` tokens: `entries`, `windows` and `tails` apart, and their `total`.

    naive, shared: see written_slots.
    """
    total = {"entries": 0.0, "windows": 0.0, "tails": 0.0}
    for slot in written_slots(model, naive=naive, shared=shared):
        kind = "tails" if slot.kind == "tail" else "entries" if slot.grows else "windows"
        total[kind] += slot.entries(context) * store.bytes(slot)
    return total | {"total": sum(total.values())}


def longest_context(model: Model, memory: float, store: Storage = AS_DECLARED) -> int:
    """Tokens of one sequence whose cache fits the memory, LIMIT at most, and no more than there are positions for."""
    longest, beyond = 0, min(LIMIT, model.config.positions or LIMIT) + 1
    while memory > 0 and beyond - longest > 1:
        middle = (longest + beyond) // 2
        fits = kv_bytes(model, middle, store)["total"] <= memory
        longest, beyond = (middle, beyond) if fits else (longest, middle)
    return longest


def read_bytes_per_step(model: Model, context: int, store: Storage = AS_DECLARED) -> float:
    """Cache bytes that one decode step reads: every reader its state, also a shared one."""
    slots = [slot for attention in model.attentions() for slot in attention.slots() if slot.kind == "entry"]
    return sum(visible_pairs(slot, 1, context) * store.bytes(slot) for slot in slots)


def flop_per_byte(model: Model, context: int, store: Storage = AS_DECLARED) -> float:
    """Operations on what one decode step reads of the cache, selecting and scoring, for each byte of it; weighted as
    by weighted_flops, since a GPU's ridge is that of bf16."""
    step = weighted(model, 1, context, store)
    read = read_bytes_per_step(model, context, store)
    return (step.scores + step.selection) / read if read else 0.0


def growth_exponent(model: Model) -> float:
    """p, where the bytes that a cache allocates grow as tokensᵖ: fitted to 4,096 … 262,144 tokens of one sequence."""
    contexts = [2**n for n in range(12, 19)]
    allocated = [sum(Cache(model, 1, tokens, "meta").num_bytes().values()) for tokens in contexts]
    return exponent(contexts, allocated)


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """p, where values grow as sizesᵖ."""
    return linear_regression([math.log(n) for n in sizes], [math.log(value) for value in values]).slope


def mtp_flops(model: Model, queries: int, context: int, pairs: PairCount = visible_pairs) -> Flops:
    """As `flops`, of multi-token prediction alone; each depth goes through the head once more."""
    total = Flops()
    for depth in range(model.mtp_depth):
        module = model.mtp[depth % len(model.mtp)]
        assert isinstance(module, Prediction)
        per_token = 2.0 * model.config.width * model.config.vocab
        per_token += module.join.flops(module.ends.streams) + module.ends.flops()
        for sublayer in module.block.sublayers():
            per_token += sublayer.residual.flops()
            if isinstance(sublayer, AttentionSublayer):
                total += sublayer.attention.flops(queries, context, pairs)
            elif isinstance(sublayer, FeedForwardSublayer):
                per_token += sublayer.feedforward.flops()
        total += Flops(projections=queries * per_token)
    return total


def flops(model: Model, queries: int, context: int, pairs: PairCount = visible_pairs) -> Flops:
    """Forward operations of the last `queries` tokens of one document of `context` tokens, the head included; without
    multi-token prediction."""
    total = Flops(projections=queries * 2.0 * model.config.width * model.config.vocab)
    for attention in [*model.attentions(), *model.writers()]:
        total += attention.flops(queries, context, pairs)
    for part in [*model.feedforwards(), *model.residuals(), model.ends]:
        total += Flops(projections=queries * part.flops())
    return total


def weighted(model: Model, queries: int, context: int, store: Storage = AS_DECLARED, weights: str = "bf16") -> Flops:
    """The same operations in bf16's, where hardware computes twice as fast in half the bits.

    Matrices are multiplied in the format of the weights, but not below fp8, in which activations are; those that are
    declared sensitive not below bf16. Scores are computed in bf16, to which a stored entry is expanded. A selection is
    computed in the format in which what it looks at is stored: its queries are rounded likewise.
    """
    plain, by_weights = flops(model, queries, context), max(_in_bf16(weights), _in_bf16("fp8"))
    sensitive = queries * _sensitive_flops(model)
    projections = (plain.projections - sensitive) * by_weights + sensitive * max(by_weights, 1.0)

    def in_its_format(slot: Slot, queries: int, context: int) -> float:
        return visible_pairs(slot, queries, context) * _in_bf16(store.format(slot))

    return Flops(projections, plain.scores, flops(model, queries, context, in_its_format).selection)


def _in_bf16(number_format: str) -> float:
    """Operations of bf16 that take as long as one of this format."""
    return BYTES[number_format] / BYTES["bf16"]


def _sensitive_flops(model: Model) -> float:
    """Per token, of the head and of the matrices that are not computed in fewer bits than bf16's."""
    parts = [*model.attentions(), *model.writers(), *model.feedforwards(), *model.residuals(), model.ends]
    specs = [(parameter, spec) for part in parts for _, parameter, spec in named_specs(part)]
    kept = sum(
        parameter.numel()
        for parameter, spec in specs
        if spec.role == "router" or (spec.role in ("projection", "output") and (spec.fp32 or spec.sensitive))
    )
    return 2.0 * (kept + model.config.width * model.config.vocab)
