"""Heavily compressed attention (DeepSeek-V4 report, arXiv 2606.19348): a window of tokens and every compressed block.

One shared head is key and value. A query reads, in one softmax with a sink, the last `window` tokens uncompressed and
one entry for each complete block of `rate` tokens of its document; an entry is visible from its block's last token on.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.contract import (
    NOTHING,
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
from models.linear import GroupedLinear, Linear, full_precision
from models.norm import RMSNorm, unit_rms
from models.parameter import Module
from models.rope import Rope, rotate_last


@dataclass(frozen=True)
class Config:
    """rate: tokens of a block. groups, group_rank: the low-rank output projection, one bottleneck per group of
    heads."""

    heads: int
    head_dim: int
    rope_dim: int
    query_latent: int
    window: int
    rate: int
    groups: int
    group_rank: int
    norm_eps: float = 1e-6
    rope: Rope = field(default_factory=lambda: Rope(pairing="interleaved"))

    def __post_init__(self) -> None:
        if min(self.heads, self.head_dim, self.query_latent, self.group_rank) < 1:
            raise ValueError("heads, head_dim, query_latent and group_rank must be positive")
        if not 2 <= self.rope_dim <= self.head_dim or self.rope_dim % 2:
            raise ValueError(
                f"rope_dim ({self.rope_dim}) must be even, at least 2 and at most head_dim ({self.head_dim})"
            )
        if self.groups < 1 or self.heads % self.groups:
            raise ValueError(f"heads ({self.heads}) must be a multiple of groups ({self.groups})")
        if self.window < 1:
            raise ValueError(f"window ({self.window}) must be at least 1, the query itself")
        if self.rate < 2:
            raise ValueError(f"rate ({self.rate}) must be at least 2: a block of one token has nothing to weigh")

    def build(self, width: int, *, writes: bool = True) -> HCA:
        return HCA(self, width, writes)


class Compressor(Module):
    """Blocks of `rate` tokens to one entry each: a softmax over the block's tokens, separately for each channel."""

    position_bias: Tensor

    def __init__(self, width: int, config: Config) -> None:
        super().__init__()
        self.config, self.rate, size = config, config.rate, config.head_dim
        self.value = Linear(width, size, ("latent", "width"))
        self.gate = Linear(width, size, ("latent", "width"))
        self.declare("position_bias", (self.rate, size), ("block", "latent"), "position_bias", fp32=True)
        self.norm = RMSNorm(size, config.norm_eps, "latent")
        self.tail = _tail(config)

    def forward(self, x: Tensor, sequence: Sequence) -> Entries:
        """Compress the blocks whose last token is in hand. x: [B, S, D]. Returns ⌈S / rate⌉ places for entries."""
        dtype = full_precision(x.dtype)
        bias = self.position_bias.to(dtype)[sequence.position % self.rate]
        rows = torch.cat((self.value(x).to(dtype), self.gate(x).to(dtype) + bias), -1)
        past, _ = sequence.before(self.tail, rows)
        last = _block_ends(sequence, self.rate)
        start = last.clamp_min(0)
        # a block ends at least rate - 1 tokens into its document, so all its rows are of this document and are present
        offsets = torch.arange(self.rate, device=x.device)
        index = (start[:, :, None] + offsets).flatten(1)
        block = _take(torch.cat((past, rows), 1), index).unflatten(1, (-1, self.rate))
        value, gate = block.chunk(2, -1)
        entry = self.norm((torch.softmax(gate, 2) * value).sum(2).to(x.dtype))
        position = sequence.position.gather(1, start)
        entry = rotate_last(self.config.rope, entry, self.config.rope_dim, position - (self.rate - 1))
        # places without a block hold whatever was gathered; their document says that nothing is there
        document = sequence.document.gather(1, start).masked_fill(last < 0, NOTHING)
        return Entries({"kv": entry}, position, document)

    def flops(self) -> float:
        """Per token."""
        return self.value.flops() + self.gate.flops()


class HCA(Attention):
    """Cached: a window of entries, one entry a block, and the rows of the block still open."""

    core: Core = staticmethod(blockwise.core)
    sink: Tensor

    def __init__(self, config: Config, width: int, writes: bool) -> None:
        super().__init__()
        c = self.config = config
        self.writes, self.width, self.scale = writes, width, c.head_dim**-0.5
        self.query_down = Linear(width, c.query_latent, ("latent", "width"))
        self.query_norm = RMSNorm(c.query_latent, c.norm_eps, "latent")
        self.query = Linear(c.query_latent, c.heads * c.head_dim, ("heads", "latent"))
        self.declare("sink", (c.heads,), ("heads",), "sink", fp32=True)
        self.group_output = GroupedLinear(c.groups, c.heads // c.groups * c.head_dim, c.group_rank)
        self.output = Linear(c.groups * c.group_rank, width, ("width", "latent"), "output")
        if writes:
            self.kv = Linear(width, c.head_dim, ("latent", "width"))
            self.kv_norm = RMSNorm(c.head_dim, c.norm_eps, "latent")
            self.compressor = Compressor(width, c)

    def slots(self) -> tuple[Slot, ...]:
        c = self.config
        kv = (Part("kv", (("latent", c.head_dim),)),)
        blocks = Slot("blocks", kv, stride=c.rate, span=c.rate)
        return (Slot("window", kv, reach=c.window), blocks, _tail(c))

    def compress(self, x: Tensor, sequence: Sequence) -> tuple[Tensor, State]:
        c = self.config
        query = self.query(self.query_norm(self.query_down(x))).unflatten(-1, (c.heads, c.head_dim))
        query = rotate_last(c.rope, unit_rms(query, c.norm_eps), c.rope_dim, sequence.position)
        if not self.writes:
            return query, {}
        kv = rotate_last(c.rope, self.kv_norm(self.kv(x)), c.rope_dim, sequence.position)
        return query, {"window": at_tokens(sequence, {"kv": kv}), "blocks": self.compressor(x, sequence)}

    def attend(self, query: Tensor, pieces: Pieces, sequence: Sequence) -> Result:
        c = self.config
        readables = []
        for slot, reach in (("window", c.window), ("blocks", None)):
            for entries in pieces[slot]:
                kv = entries.parts["kv"].unsqueeze(2)
                readables.append((kv, kv, Visibility.of(entries, sequence, reach)))
        out = read(self.core, query, readables, self.scale, self.sink)
        # rotating back leaves each value turned by its distance to the query, not by its absolute position
        out = rotate_last(c.rope, out, c.rope_dim, sequence.position, inverse=True)
        return Result(self.output(self.group_output(out.flatten(-2))))

    def flops(self, queries: int, context: int, pairs: PairCount = visible_pairs) -> Flops:
        c = self.config
        projections = self.query_down.flops() + self.query.flops() + self.group_output.flops() + self.output.flops()
        if self.writes:
            projections += self.kv.flops() + self.compressor.flops()
        window, blocks, _ = self.slots()
        scored = pairs(window, queries, context) + pairs(blocks, queries, context)
        return Flops(queries * projections, scored * 4.0 * c.heads * c.head_dim)


def _tail(config: Config) -> Slot:
    """The rows of the block still open: value and gate of each token, in fp32 as they are summed."""
    value_gate = Part("value_gate", (("latent", 2 * config.head_dim),), "fp32")
    return Slot("open_block", (value_gate,), kind="tail", rows=config.rate - 1)


def _block_ends(sequence: Sequence, rate: int) -> Tensor:
    """[B, ⌈S / rate⌉]: where in the tokens in hand the blocks end, in order; -1 in the places left over.

    Documents restart the blocks, so their number differs from row to row; the shape does not.
    """
    position = sequence.position
    num_rows, length = position.shape
    places = -(-length // rate)
    ends = (position % rate == rate - 1) & (sequence.document != NOTHING)
    rank = ends.cumsum(1) - 1
    index = torch.where(ends, rank, places)
    last = torch.full((num_rows, places + 1), -1, dtype=torch.int64, device=position.device)
    tokens = torch.arange(length, device=position.device).expand(num_rows, length)
    return last.scatter(1, index, tokens)[:, :places]


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """rows[b, index[b, i]]: rows [B, T, d], index [B, N]."""
    return rows.gather(1, index[:, :, None].expand(-1, -1, rows.shape[-1]))
