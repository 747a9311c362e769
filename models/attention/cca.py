"""Compressed convolutional attention (CCA, arXiv 2510.04476): attention inside a narrow latent that convolutions mix.

Queries and keys are projected down, then convolved along the sequence, per channel and then per head, beside the mean
of the two as a way round; half of the value comes from the token before. The latent heads are what is scored and
cached: nothing is expanded. With fewer key than query heads it is CCGQA (section 3.3). Norm and temperature as
ZAYA1-8B has them (arXiv 2605.05365): the temperature is a factor on the key, and starts at one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from models import output, sink
from models.contract import (
    Attention,
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
from models.linear import Linear, full_precision
from models.output import Grouped
from models.parameter import Module
from models.rope import Rope, rotate_first


@dataclass(frozen=True)
class Config:
    """channel_taps, head_taps: tokens under the two convolutions. rope_dim: leading numbers of a head that are rotated.

    window: tokens a query reads, itself included; null reads all. bias: in the five projections. sink: see
    models.sink. output: null for one matrix, see models.output.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rope_dim: int
    channel_taps: int = 2
    head_taps: int = 2
    window: int | None = None
    bias: bool = False
    sink: bool = False
    output: Grouped | None = None
    rope: Rope = field(default_factory=Rope)

    def __post_init__(self) -> None:
        if min(self.heads, self.kv_heads, self.head_dim, self.channel_taps, self.head_taps) < 1:
            raise ValueError("heads, kv_heads, head_dim, channel_taps and head_taps must be positive")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.kv_heads * self.head_dim % 2:
            raise ValueError(
                f"kv_heads × head_dim ({self.kv_heads * self.head_dim}) must be even: half of a value is delayed"
            )
        if self.rope_dim % 2 or not 0 <= self.rope_dim <= self.head_dim:
            raise ValueError(f"rope_dim ({self.rope_dim}) must be even and at most head_dim ({self.head_dim})")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window ({self.window}) must be at least 1, the query itself; null is no window")
        if self.output is not None:
            self.output.check(self.heads)

    def build(self, width: int, *, writes: bool = True) -> CCA:
        if not writes:
            raise ValueError(
                "cca mixes each layer's queries with its own keys, so it cannot read another layer's state"
            )
        return CCA(self, width)


class Convolutions(Module):
    """Two causal convolutions without anything between: one filter a channel, then one matrix a head and tap."""

    channel_weight: Tensor
    channel_bias: Tensor
    head_weight: Tensor
    head_bias: Tensor

    def __init__(self, heads: int, head_dim: int, channel_taps: int, head_taps: int) -> None:
        super().__init__()
        size = heads * head_dim
        self.head_dim = head_dim
        self.declare("channel_weight", (size, 1, channel_taps), ("heads", "one", "tap"), "convolution")
        self.declare("channel_bias", (size,), ("heads",), "bias")
        self.declare("head_weight", (size, head_dim, head_taps), ("heads", "head_dim", "tap"), "convolution")
        self.declare("head_bias", (size,), ("heads",), "bias")

    @property
    def reach(self) -> int:
        """Rows before a token that its result depends on."""
        return self.channel_weight.shape[-1] + self.head_weight.shape[-1] - 2

    def forward(self, rows: Tensor, position: Tensor) -> Tensor:
        """rows: [B, reach + S, heads · head_dim], of which the last S are the tokens in hand; position: [B, S].

        A row of another document counts as zero, as one before the start does; what the first convolution makes of such
        rows alone is its bias.
        """
        length = position.shape[1]

        def shifted(by: int) -> Tensor:
            start = rows.shape[1] - length - by
            return rows[:, start : start + length] * (position >= by)[..., None].to(rows.dtype)

        past = [shifted(by) for by in range(self.reach + 1)]
        channel, per_head = self.channel_weight.to(rows.dtype).flip(-1), self.head_weight.to(rows.dtype).flip(-1)
        total = self.head_bias.to(rows.dtype)
        for i, matrix in enumerate(per_head.unbind(-1)):
            mixed = self.channel_bias.to(rows.dtype)
            for j, tap in enumerate(channel.unbind(-1)):
                mixed = mixed + tap[:, 0] * past[i + j]
            heads = mixed.unflatten(-1, (-1, self.head_dim))
            blocks = matrix.unflatten(0, (-1, self.head_dim))
            total = total + torch.einsum("bshd,hed->bshe", heads, blocks).flatten(-2)
        return total

    def flops(self) -> float:
        """Per token, of the matrices."""
        return 2.0 * self.head_weight.numel()


class CCA(Attention):
    """Cached: K and V of the latent heads as they are read. Tails: rows under the convolutions, the delayed half."""

    core: Core = staticmethod(blockwise.core)
    sink: Tensor | None
    temperature: Tensor
    writes = True

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        c = self.config = config
        self.width, self.scale = width, c.head_dim**-0.5
        keys = c.kv_heads * c.head_dim
        self.query = Linear(width, c.heads * c.head_dim, ("heads", "width"), bias=c.bias)
        self.key = Linear(width, keys, ("kv_heads", "width"), bias=c.bias)
        self.value_now = Linear(width, keys // 2, ("kv_heads", "width"), bias=c.bias)
        self.value_before = Linear(width, keys // 2, ("kv_heads", "width"), bias=c.bias)
        self.convolutions = Convolutions(c.heads + c.kv_heads, c.head_dim, c.channel_taps, c.head_taps)
        self.declare("temperature", (c.kv_heads,), ("kv_heads",), "gain", fp32=True)
        self.output = output.build(c.output, c.heads * c.head_dim, width, bias=c.bias)
        sink.declare(self, c.heads, wanted=c.sink)

    def slots(self) -> tuple[Slot, ...]:
        c = self.config
        dims = (("kv_heads", c.kv_heads), ("head_dim", c.head_dim))
        kv = Slot("kv", (Part("key", dims), Part("value", dims)), reach=c.window)
        return (kv, *self._tails())

    def _tails(self) -> tuple[Slot, ...]:
        c = self.config
        delayed = Part("value", (("latent", c.kv_heads * c.head_dim // 2),))
        tails = [Slot("delayed", (delayed,), kind="tail", rows=1)]
        if self.convolutions.reach:
            rows = Part("rows", (("latent", (c.heads + c.kv_heads) * c.head_dim),))
            tails.append(Slot("convolved", (rows,), kind="tail", rows=self.convolutions.reach))
        return tuple(tails)

    def compress(self, x: Tensor, sequence: Sequence) -> tuple[Tensor, State]:
        c, (delayed, *convolved) = self.config, self._tails()
        query, key = self.query(x), self.key(x)
        rows = torch.cat((query, key), -1)
        past = [sequence.before(slot, rows)[0] for slot in convolved]
        mixed = self.convolutions(torch.cat((*past, rows), 1), sequence.position).unflatten(-1, (-1, c.head_dim))
        query, key = (part.unflatten(-1, (-1, c.head_dim)) for part in (query, key))
        groups = query.shape[2] // key.shape[2]
        query_mean = (query + key.repeat_interleave(groups, 2)) / 2
        key_mean = query_mean.unflatten(2, (-1, groups)).mean(3)
        mixed_query, mixed_key = mixed.split((query.shape[2], key.shape[2]), 2)
        query = _normalised(mixed_query + query_mean)
        key = _normalised(mixed_key + key_mean)
        key = (key.to(self.temperature.dtype) * self.temperature[:, None]).to(key.dtype)
        query, key = (rotate_first(c.rope, part, c.rope_dim, sequence.position) for part in (query, key))
        value = torch.cat((self.value_now(x), self._delayed(x, delayed, sequence)), -1)
        parts = {"key": key, "value": value.unflatten(-1, (-1, c.head_dim))}
        return query, {"kv": at_tokens(sequence, parts)}

    def _delayed(self, x: Tensor, tail: Slot, sequence: Sequence) -> Tensor:
        """The second half of the value, of the token before; of a document's first token, the bias alone."""
        rows = F.linear(x, self.value_before.weight.to(x.dtype))
        past, _ = sequence.before(tail, rows)
        shifted = torch.cat((past, rows), 1)[:, :-1] * (sequence.position > 0)[..., None].to(x.dtype)
        return shifted if self.value_before.bias is None else shifted + self.value_before.bias.to(x.dtype)

    def attend(self, query: Tensor, pieces: Pieces, sequence: Sequence) -> Result:
        readables = [
            (kv.parts["key"], kv.parts["value"], Visibility.of(kv, sequence, self.config.window)) for kv in pieces["kv"]
        ]
        return Result(self.output(read(self.core, query, readables, self.scale, self.sink).flatten(-2)))

    def flops(self, queries: int, context: int, pairs: PairCount = visible_pairs) -> Flops:
        linear = (self.query, self.key, self.value_now, self.value_before, self.output)
        projections = sum(one.flops() for one in linear) + self.convolutions.flops()
        per_pair = 4.0 * self.config.heads * self.config.head_dim
        return Flops(queries * projections, pairs(self.slots()[0], queries, context) * per_pair)


def _normalised(heads: Tensor) -> Tensor:
    """Each head to the length √head_dim."""
    wide = heads.to(full_precision(heads.dtype))
    length = wide.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(wide.dtype).eps)
    return (wide * (heads.shape[-1] ** 0.5 / length)).to(heads.dtype)
