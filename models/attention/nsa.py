"""Native sparse attention (arXiv 2502.11089, section 3): three branches, each with keys and values of its own, summed
under gates.

Compressed: one entry for every `stride` tokens, made of the `block` tokens up to there by an MLP. Selected: the tokens
of a few blocks, those that weigh most in the compressed softmax; the heads of a KV head read the same. Window: the last
tokens. Choosing has no gradient; the compressed branch learns by what it reads itself.

What the paper leaves open, and what is done here. The MLP: the block's rows, each with a learned vector for its place
added, side by side through one hidden layer (SiLU, no biases), one MLP for keys and one for values, shared by KV heads.
Positions: rows enter it unrotated and the entry's key is rotated by the position of its first token, as DeepSeek-V4's
blocks are, so that distances between entries mean the same everywhere. The gates: one linear map and a sigmoid, for
each branch and head. A branch in which a query sees nothing yet contributes zero. Equation 9's indices are read as the
overlap that they count; `stride` divides both blocks, and `block` is no longer than a selected one, as there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import output
from models.compressor import entry_ends, rows_before
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
from models.cores import blockwise, gathered
from models.cores.merge import Core, read
from models.linear import Linear, full_precision
from models.output import Grouped
from models.parameter import Module
from models.rope import Rope
from models.selection import blocks, ranges, selected
from models.selection.blocks import BlockChoice
from models.selection.index import together
from models.selection.teacher import Attended
from models.selection.top import NOWHERE

BRANCHES = ("compressed", "selected", "window")


@dataclass(frozen=True)
class Config:
    """block, stride: an entry of the compressed branch is made of `block` tokens, every `stride` tokens. hidden: width
    of the MLP that makes it. selection: blocks that are read token by token. window: tokens, the query included.

    value_dim: numbers of a head's value; null for head_dim. output: null for one matrix, see models.output.
    """

    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    block: int = 32
    stride: int = 16
    window: int = 512
    value_dim: int | None = None
    output: Grouped | None = None
    selection: BlockChoice = field(default_factory=BlockChoice)
    rope: Rope = field(default_factory=Rope)

    def __post_init__(self) -> None:
        if min(self.heads, self.kv_heads, self.head_dim, self.hidden, self.stride, self.values) < 1:
            raise ValueError("heads, kv_heads, head_dim, value_dim, hidden and stride must be positive")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even to be rotated")
        if self.block % self.stride or self.selection.size % self.stride:
            raise ValueError(
                f"stride ({self.stride}) must divide block ({self.block}) and selection.size ({self.selection.size})"
            )
        if not 2 <= self.block <= self.selection.size:
            raise ValueError(
                f"block ({self.block}) must lie between 2 and selection.size ({self.selection.size}): an entry speaks "
                "for at most two of the blocks that it helps to choose"
            )
        if self.window < 1:
            raise ValueError(f"window ({self.window}) must be at least 1, the query itself")
        if self.output is not None:
            self.output.check(self.heads)

    @property
    def values(self) -> int:
        """Numbers of a head's value."""
        return self.head_dim if self.value_dim is None else self.value_dim

    def build(self, width: int, *, writes: bool = True) -> NSA:
        return NSA(self, width, writes)


class Query(NamedTuple):
    """heads: [B, S, H, d], for all branches. gate: [B, S, H, branches]."""

    heads: Tensor
    gate: Tensor


class BlockMLP(Module):
    """The rows of a block, [..., l, d], to one row [..., d]."""

    position: Tensor

    def __init__(self, block: int, size: int, hidden: int) -> None:
        super().__init__()
        self.declare("position", (block, size), ("block", "head_dim"), "position_bias")
        self.up = Linear(block * size, hidden, ("latent", "block"))
        self.down = Linear(hidden, size, ("head_dim", "latent"))

    def forward(self, rows: Tensor) -> Tensor:
        made: Tensor = self.down(F.silu(self.up((rows + self.position.to(rows.dtype)).flatten(-2))))
        return made

    def flops(self) -> float:
        """For each block."""
        return self.up.flops() + self.down.flops()


class NSA(Attention):
    """Cached: K and V of every token, of the compressed blocks and of a window, and the rows of blocks still open."""

    core: Core = staticmethod(blockwise.core)

    def __init__(self, config: Config, width: int, writes: bool) -> None:
        super().__init__()
        c = self.config = config
        self.writes, self.width, self.scale = writes, width, c.head_dim**-0.5
        heads = ("kv_heads", c.kv_heads)
        entry = Part("key", (heads, ("head_dim", c.head_dim))), Part("value", (heads, ("value_dim", c.values)))
        both = Part("key_value", (heads, ("head_dim", c.head_dim + c.values)))
        self.compressed = Slot("compressed", entry, stride=c.stride, span=c.block)
        self.selected = Slot("selected", entry, chosen=c.selection.top_k * c.selection.size)
        self.window = Slot("window", entry, reach=c.window)
        self.open = Slot("open_blocks", (both,), kind="tail", rows=c.block - 1)
        self.query = Linear(width, c.heads * c.head_dim, ("heads", "width"))
        self.gate = Linear(width, c.heads * len(BRANCHES), ("heads", "width"))
        self.output = output.build(c.output, c.heads * c.values, width)
        if writes:
            self.key = nn.ModuleDict({name: self._to_heads(c.head_dim) for name in BRANCHES})
            self.value = nn.ModuleDict({name: self._to_heads(c.values) for name in BRANCHES})
            self.block_key = BlockMLP(c.block, c.head_dim, c.hidden)
            self.block_value = BlockMLP(c.block, c.values, c.hidden)

    def _to_heads(self, size: int) -> Linear:
        return Linear(self.width, self.config.kv_heads * size, ("kv_heads", "width"))

    def slots(self) -> tuple[Slot, ...]:
        return self.compressed, self.selected, self.window, self.open

    def compress(self, x: Tensor, sequence: Sequence) -> tuple[Query, State]:
        c, position = self.config, sequence.position
        gate = torch.sigmoid(self.gate(x).to(full_precision(x.dtype))).to(x.dtype).unflatten(-1, (-1, len(BRANCHES)))
        query = Query(c.rope.rotate(self.query(x).unflatten(-1, (-1, c.head_dim)), position), gate)
        if not self.writes:
            return query, {}
        keys = {name: linear(x).unflatten(-1, (-1, c.head_dim)) for name, linear in self.key.items()}
        values = {name: linear(x).unflatten(-1, (-1, c.values)) for name, linear in self.value.items()}
        state = {"compressed": self._blocks(torch.cat((keys["compressed"], values["compressed"]), -1), sequence)}
        for name in ("selected", "window"):
            parts = {"key": c.rope.rotate(keys[name], position), "value": values[name]}
            state[name] = at_tokens(sequence, parts)
        return query, state

    def _blocks(self, rows: Tensor, sequence: Sequence) -> Entries:
        """rows: [B, S, K, d + e], each token's key and value before they are compressed."""
        c, last = self.config, entry_ends(sequence, self.compressed)
        # places without a block hold whatever is gathered; their document says that nothing is there
        start = last.clamp_min(0)
        block = rows_before(self.open, rows, start, c.block, sequence).transpose(2, 3)
        key, value = block.split((c.head_dim, c.values), -1)
        position = sequence.position.gather(1, start)
        key = c.rope.rotate(self.block_key(key), position - (c.block - 1))
        document = sequence.document.gather(1, start).masked_fill(last < 0, NOTHING)
        return Entries({"key": key, "value": self.block_value(value)}, position, document)

    def attend(self, query: Query, pieces: Pieces, sequence: Sequence) -> Result:
        outs = (
            self._read(query.heads, pieces["compressed"], sequence),
            self._read_selected(query.heads, pieces, sequence),
            self._read(query.heads, pieces["window"], sequence, self.config.window),
        )
        gated = [out * gate[..., None] for out, gate in zip(outs, query.gate.unbind(-1), strict=True)]
        return Result(self.output((gated[0] + gated[1] + gated[2]).flatten(-2)))

    def _read(self, heads: Tensor, pieces: list[Entries], sequence: Sequence, reach: int | None = None) -> Tensor:
        """Everything of a branch that is visible; zeros where nothing is."""
        readables = [
            (piece.parts["key"], piece.parts["value"], Visibility.of(piece, sequence, reach))
            for piece in pieces
            if piece.position.shape[1] > 0
        ]
        if not readables:
            return heads.new_zeros(*heads.shape[:3], self.config.values)
        return read(self.core, heads, readables, self.scale)

    def _read_selected(self, heads: Tensor, pieces: Pieces, sequence: Sequence) -> Tensor:
        choice, tokens = self.config.selection, together(pieces["selected"])
        num_blocks = -(-tokens.position.shape[1] // choice.size)
        if num_blocks <= choice.top_k:  # all that is visible is read
            return self._read(heads, pieces["selected"], sequence)
        entries = together(pieces["compressed"])
        attended = Attended(heads, entries.parts["key"], self.scale)
        chosen = selected(blocks.choose(choice, num_blocks, attended, self.compressed, entries, sequence))
        first = torch.where(chosen == NOWHERE, NOWHERE, chosen * choice.size)
        places = ranges.find(tokens, first, choice.size, sequence)
        out, _, _ = gathered.core(heads, (tokens.parts["key"],), places, self.scale, value=tokens.parts["value"])
        return out

    def flops(self, queries: int, context: int, pairs: PairCount = visible_pairs) -> Flops:
        """Decode runs the MLPs at every step, whether a block ends there or not. A query's own block, of which it reads
        what lies before it, counts as whole."""
        c = self.config
        projections = self.query.flops() + self.gate.flops() + self.output.flops()
        made = 0.0
        if self.writes:
            projections += 2.0 * self.width * len(BRANCHES) * c.kv_heads * (c.head_dim + c.values)
            made = -(-queries // c.stride) * c.kv_heads * (self.block_key.flops() + self.block_value.flops())
        read = sum(pairs(slot, queries, context) for slot in (self.compressed, self.selected, self.window))
        looked_at = 0.0
        if -(-context // c.selection.size) > c.selection.top_k:
            looked_at = pairs(self.compressed, queries, context)
        return Flops(
            queries * projections + made,
            read * 2.0 * c.heads * (c.head_dim + c.values),
            looked_at * 2.0 * c.heads * c.head_dim,
        )
