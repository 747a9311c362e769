"""Grouped-query attention (arXiv 2305.13245): K KV heads for H query heads; K = H is MHA, K = 1 is MQA (arXiv
1911.02150).

Options: an RMSNorm on each query and key head before the rotation (QK-norm, arXiv 2302.05442), one without a gain on
each value head (Gemma 4), a sliding window (arXiv 2004.05150), a gate on what is read (models.output_gate), a sink
(models.sink), and a grouped output (models.output).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from torch import Tensor

from conf.schema import at_least
from models import output, sink
from models.contract import (
    Attention,
    Entries,
    Flops,
    PairCount,
    Part,
    Pieces,
    Result,
    Sequence,
    Slot,
    State,
    Visibility,
    at_tokens,
    visible_pairs,
)
from models.cores import blockwise
from models.cores.merge import Core, read
from models.linear import Linear
from models.norm import Gain, RMSNorm, unit_rms
from models.output import Grouped, GroupedOutput
from models.output_gate import Kind, OutputGate
from models.rope import Rope, rotate_first


@dataclass(frozen=True)
class Config:
    """window: tokens a query reads, itself included; null reads all. bias: in all four projections. rope: null for no
    positions. rope_dim: how many numbers of a head, its first, are rotated; null for all. gate: null for none. sink:
    see models.sink. output: null for one matrix, see models.output.

    scale: of the scores; null for 1 / √head_dim. With another one, QK-norm's key gain starts where the scores are as
    wide as with that one, or the softmax of an untrained model would be saturated.
    """

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    qk_norm: bool = False
    value_norm: bool = False
    scale: float | None = None
    bias: bool = False
    norm_eps: float = 1e-6
    rope: Rope | None = field(default_factory=Rope)
    rope_dim: int | None = None
    gate: Kind | None = None
    sink: bool = False
    output: Grouped | None = None
    stands_alone: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if min(self.heads, self.kv_heads, self.head_dim) < 1:
            raise ValueError("heads, kv_heads and head_dim must be positive")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.scale is not None and self.scale <= 0:
            raise ValueError(f"scale ({self.scale}) must be positive; leave it null for 1 / √head_dim")
        at_least(0, self, "norm_eps")
        if self.rope_dim is not None and (self.rope is None or not 2 <= self.rope_dim <= self.head_dim):
            raise ValueError(
                f"rope_dim ({self.rope_dim}) must lie between 2 and head_dim ({self.head_dim}), and needs a rope; "
                "leave it null to rotate whole heads, and rope null to rotate nothing"
            )
        if self.rope and self.rotated_dim % 2:
            raise ValueError(
                f"{'rope_dim' if self.rope_dim else 'head_dim'} ({self.rotated_dim}) must be even to be rotated"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(
                f"window ({self.window}) must be at least 1, the query itself; leave it null for no window"
            )
        if self.output is not None:
            self.output.check(self.heads)

    @property
    def rotated_dim(self) -> int:
        """How many numbers of a head a rope turns."""
        return self.head_dim if self.rope_dim is None else self.rope_dim

    def build(self, width: int, *, writes: bool = True, reads: bool = True) -> GQA:
        return GQA(self, width, writes, reads)


class Query(NamedTuple):
    """heads: [B, S, H, d]. gate: what `attend` multiplies what they read by."""

    heads: Tensor
    gate: Tensor | None


class GQA(Attention):
    """K and V of each KV head are cached as they are read."""

    core: Core = staticmethod(blockwise.core)
    key_norm: RMSNorm | Gain | None
    sink: Tensor | None

    def __init__(self, config: Config, width: int, writes: bool, reads: bool = True) -> None:
        super().__init__()
        c = self.config = config
        self.writes, self.reads, self.width = writes, reads, width
        self.scale = c.head_dim**-0.5 if c.scale is None else c.scale
        if reads:
            self.query = Linear(width, c.heads * c.head_dim, ("heads", "width"), bias=c.bias)
            self.output = output.build(c.output, c.heads * c.head_dim, width, bias=c.bias)
            self.query_norm = RMSNorm(c.head_dim, c.norm_eps, "head_dim") if c.qk_norm else None
            self.gate = OutputGate(c.gate, width, c.heads, c.head_dim) if c.gate else None
            sink.declare(self, c.heads, wanted=c.sink)
        self.build_state()

    def build_state(self) -> None:
        """Declare what the state is made with."""
        if self.writes:
            c = self.config
            self.key = Linear(self.width, c.kv_heads * c.head_dim, ("kv_heads", "width"), bias=c.bias)
            self.value = Linear(self.width, c.kv_heads * c.head_dim, ("kv_heads", "width"), bias=c.bias)
            self.key_norm = RMSNorm(c.head_dim, c.norm_eps, "head_dim", self.first_gain()) if c.qk_norm else None

    def first_gain(self) -> float:
        """Of the keys: scores of an untrained model are then as wide as with the usual scale."""
        return float(self.config.head_dim**-0.5 / self.scale)

    def slots(self) -> tuple[Slot, ...]:
        dims = (("kv_heads", self.config.kv_heads), ("head_dim", self.config.head_dim))
        return (Slot("kv", (Part("key", dims), Part("value", dims)), reach=self.config.window),)

    def compress(self, x: Tensor, sequence: Sequence) -> tuple[Query, State]:
        heads = self.heads(self.query(x))
        heads = self.rotated(heads if self.query_norm is None else self.query_norm(heads), sequence.position)
        query = Query(heads, None if self.gate is None else self.gate(x))
        return query, self.write(x, sequence) if self.writes else {}

    def write(self, x: Tensor, sequence: Sequence) -> State:
        return {"kv": at_tokens(sequence, self.leave(x, sequence.position))}

    def leave(self, x: Tensor, position: Tensor) -> dict[str, Tensor]:
        """The parts of the entries that the tokens in hand leave, each [B, S, K, d]."""
        key, value = self.heads(self.key(x)), self.heads(self.value(x))
        if self.config.value_norm:
            value = unit_rms(value, self.config.norm_eps)
        return {"key": self.rotated(key if self.key_norm is None else self.key_norm(key), position), "value": value}

    def keys_values(self, kv: Entries) -> tuple[Tensor, Tensor]:
        """What is read of entries, each [B, T, K, d]."""
        return kv.parts["key"], kv.parts["value"]

    def attend(self, query: Query, pieces: Pieces, sequence: Sequence) -> Result:
        window = self.config.window
        readables = [(*self.keys_values(kv), Visibility.of(kv, sequence, window)) for kv in pieces["kv"]]
        return self.result(read(self.core, query.heads, readables, self.scale, self.sink), query)

    def result(self, out: Tensor, query: Query) -> Result:
        """out: [B, S, H, d], what the heads read."""
        return Result(self.output((out if query.gate is None else out * query.gate).flatten(-2)))

    def flops(self, queries: int, context: int, pairs: PairCount = visible_pairs) -> Flops:
        projections = sum(part.flops() for part in self.children() if isinstance(part, Linear | GroupedOutput))
        scored = sum(pairs(slot, queries, context) for slot in self.slots()) if self.reads else 0.0
        return Flops(queries * projections, scored * 4.0 * self.config.heads * self.config.head_dim)

    def heads(self, x: Tensor) -> Tensor:
        """[..., n · d] to [..., n, d]."""
        return x.unflatten(-1, (-1, self.config.head_dim))

    def rotated(self, x: Tensor, position: Tensor) -> Tensor:
        """x: [B, S, n, d]; position: [B, S]."""
        c = self.config
        return x if c.rope is None else rotate_first(c.rope, x, c.rotated_dim, position)
