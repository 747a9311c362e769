"""Blocks of tokens to one entry each (DeepSeek-V4 report, arXiv 2606.19348, section 2.3), as CSA, HCA and their indexer
share it.

An entry is a mean of its block's rows, weighed by a softmax over the rows, separately for each channel. With a second
series of rows it also takes in the block before: entries then overlap, each token speaks for two of them, and through
different matrices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.contract import NOTHING, Entries, Packing, Part, Sequence, Slot
from models.linear import Linear, full_precision
from models.norm import RMSNorm
from models.parameter import Module
from models.rope import Rope, rotate_last


@dataclass(frozen=True)
class Blocks:
    """What a compressor leaves behind, known to whoever reads it too.

    size: numbers of an entry, of which the last rope_dim are rotated, by the position of the block's first token. rate:
    tokens of a block. tails: names of the tails that decode keeps, one for each series of rows; the last series is of
    the entry's own block, the one before it of the block before. The released weights hold the series in this order.
    """

    name: str
    tails: tuple[str, ...]
    size: int
    rate: int
    rope: Rope
    rope_dim: int
    norm_eps: float
    packed: Packing = ()

    def slot(self) -> Slot:
        """One entry a block."""
        entry, before = Part("kv", (("latent", self.size),), packed=self.packed), self.rate * (len(self.tails) - 1)
        return Slot(self.name, (entry,), stride=self.rate, span=before + self.rate, origin=-before)

    def tail_slots(self) -> tuple[Slot, ...]:
        """Value and gate of each token, in fp32 as they are summed: as many as the next entry will need."""
        rows = Part("value_gate", (("latent", 2 * self.size),), "fp32")
        reached = range(len(self.tails), 0, -1)
        return tuple(
            Slot(name, (rows,), kind="tail", rows=blocks * self.rate - 1)
            for name, blocks in zip(self.tails, reached, strict=True)
        )

    def slots(self) -> tuple[Slot, ...]:
        return (self.slot(), *self.tail_slots())


class Compressor(Module):
    """One entry for each complete block; documents restart the blocks."""

    position_bias: Tensor

    def __init__(self, width: int, blocks: Blocks) -> None:
        super().__init__()
        self.blocks, self.rate, self.size = blocks, blocks.rate, blocks.size
        self.slot, self.tails = blocks.slot(), blocks.tail_slots()
        series = (self.size,) * len(self.tails)
        # DeepSeek's code keeps both out of fp8
        self.value = Linear(width, sum(series), ("latent", "width"), split=series, sensitive=True)
        self.gate = Linear(width, sum(series), ("latent", "width"), split=series, sensitive=True)
        self.declare("position_bias", (self.rate, sum(series)), ("block", "latent"), "position_bias", fp32=True)
        self.norm = RMSNorm(self.size, blocks.norm_eps, "latent")

    def forward(self, x: Tensor, sequence: Sequence) -> Entries:
        """x: [B, S, D]. As many places as blocks can end among S tokens, ⌈S / rate⌉; not each of them holds one."""
        dtype = full_precision(x.dtype)
        bias = self.position_bias.to(dtype)[sequence.position % self.rate]
        value, gate = self.value(x).to(dtype), self.gate(x).to(dtype) + bias
        last = entry_ends(sequence, self.slot)
        # places without a block hold whatever is gathered; their document says that nothing is there
        start = last.clamp_min(0)
        position = sequence.position.gather(1, start)
        values, gates = [], []
        for tail, v, g in zip(self.tails, value.split(self.size, -1), gate.split(self.size, -1), strict=True):
            block = self._block(tail, torch.cat((v, g), -1), start, sequence)
            block_value, block_gate = block.chunk(2, -1)
            if tail is not self.tails[-1]:
                # a block has all its own rows; the block before it need not be there
                absent = position < tail.rows
                block_gate = block_gate.masked_fill(absent[..., None, None], float("-inf"))
            values.append(block_value)
            gates.append(block_gate)
        weights = torch.softmax(torch.cat(gates, 2), 2)
        entry = self.norm((weights * torch.cat(values, 2)).sum(2).to(x.dtype))
        entry = rotate_last(self.blocks.rope, entry, self.blocks.rope_dim, position - (self.rate - 1))
        document = sequence.document.gather(1, start).masked_fill(last < 0, NOTHING)
        return Entries({"kv": entry}, position, document)

    def flops(self) -> float:
        """Per token."""
        return self.value.flops() + self.gate.flops()

    def _block(self, tail: Slot, rows: Tensor, last: Tensor, sequence: Sequence) -> Tensor:
        """rows: [B, S, d] of one series; last: [B, N], where blocks end. Returns [B, N, rate, d]: each one's rows, or
        those of the block as far before it as the tail is long."""
        return rows_before(tail, rows, last, self.rate, sequence)


def rows_before(tail: Slot, rows: Tensor, last: Tensor, size: int, sequence: Sequence) -> Tensor:
    """rows: [B, S, ...], of which `tail` keeps the last; last: [B, N], of the tokens in hand. Returns [B, N, size,
    ...]: of the rows up to each last one, as many as the tail holds and itself, the first `size`."""
    past, _ = sequence.before(tail, rows)
    index = (last[:, :, None] + torch.arange(size, device=rows.device)).flatten(1)
    index = index.view(*index.shape, *[1] * (rows.dim() - 2)).expand(-1, -1, *rows.shape[2:])
    return torch.cat((past, rows), 1).gather(1, index).unflatten(1, (-1, size))


def entry_ends(sequence: Sequence, slot: Slot) -> Tensor:
    """[B, ⌈S / stride⌉]: where in the tokens in hand the slot's entries end, in order; -1 in the places left over.

    Documents start anew, so the number of entries differs from row to row; the shape does not.
    """
    since_first = sequence.position - (slot.lead - 1)
    num_rows, length = since_first.shape
    places = -(-length // slot.stride)
    ends = (since_first >= 0) & (since_first % slot.stride == 0) & (sequence.document != NOTHING)
    rank = ends.cumsum(1) - 1
    index = torch.where(ends, rank, places)
    last = torch.full((num_rows, places + 1), -1, dtype=torch.int64, device=ends.device)
    tokens = torch.arange(length, device=ends.device).expand(num_rows, length)
    return last.scatter(1, index, tokens)[:, :places]
