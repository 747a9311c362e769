"""Anchor tokens (StreamingLLM, arXiv 2309.17453: a window and the first tokens; Sparse Transformers, arXiv 1904.10509,
section 4.2: the last token of every stride): grouped-query attention in one softmax over these three.

Each kind has a slot of its own, so that a cache of T tokens holds window + first + (T − first) / stride entries and
nothing else. A token that is of several kinds is read once: as of the window where it lies in it, else as one of the
first; strides begin after the first tokens.

Unlike StreamingLLM's, positions are those of the document, not of the cache: the model is trained as it is read.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from models.attention import gqa
from models.compressor import entry_ends
from models.contract import (
    NOTHING,
    Entries,
    Pieces,
    Result,
    Sequence,
    Slot,
    State,
    Visibility,
)
from models.cores import gathered
from models.cores.merge import Partial, merge, parts
from models.selection import ranges
from models.selection.index import together


@dataclass(frozen=True)
class Config(gqa.Config):
    """As gqa's, with a window. first: how many tokens of a document all its queries read. stride: of the tokens after
    them the last of every `stride` is read by all that come later; null for none."""

    first: int = field(kw_only=True)
    stride: int | None = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is None:
            raise ValueError("window must be given: without one every token is read, and anchors anchor nothing")
        if self.first < 0 or (self.stride is not None and self.stride < 2):
            raise ValueError(
                f"first ({self.first}) must not be negative and stride ({self.stride}) at least 2, or null for no "
                "strided anchors"
            )
        if self.first == 0 and self.stride is None:
            raise ValueError("first is 0 and stride null, which leaves a window alone; choose gqa for that")

    def build(self, width: int, *, writes: bool = True, reads: bool = True) -> Anchors:
        return Anchors(self, width, writes, reads)


class Anchors(gqa.GQA):
    """Cached: K and V of a window, of the first tokens, and of the last one of every stride."""

    config: Config

    def __init__(self, config: Config, width: int, writes: bool, reads: bool = True) -> None:
        super().__init__(config, width, writes, reads)
        (kv,) = super().slots()
        self.window, anchor = replace(kv, name="window"), replace(kv, reach=None, beyond=kv.reach or 0)
        self.first = replace(anchor, name="first", limit=config.first) if config.first else None
        self.strided: Slot | None = None
        if config.stride is not None:
            last = config.first + config.stride - 1
            self.strided = replace(anchor, name="strided", stride=config.stride, origin=last)

    def slots(self) -> tuple[Slot, ...]:
        return tuple(slot for slot in (self.window, self.first, self.strided) if slot is not None)

    def write(self, x: Tensor, sequence: Sequence) -> State:
        (tokens,) = super().write(x, sequence).values()
        state = {self.window.name: tokens}
        if self.first is not None:
            document = torch.where(sequence.position < self.config.first, sequence.document, NOTHING)
            state[self.first.name] = Entries(tokens.parts, sequence.position, document)
        if self.strided is not None:
            state[self.strided.name] = _at(tokens, entry_ends(sequence, self.strided))
        return state

    def attend(self, query: gqa.Query, pieces: Pieces, sequence: Sequence) -> Result:
        dense = [slot for slot in (self.window, self.strided) if slot is not None]
        readables = [
            (*self.keys_values(kv), Visibility.of(kv, sequence, slot.reach, slot.beyond))
            for slot in dense
            for kv in pieces[slot.name]
        ]
        partials = parts(self.core, query.heads, readables, self.scale)
        if self.first is not None:
            partials.append(self._read_first(self.first, query.heads, together(pieces[self.first.name]), sequence))
        return self.result(merge(partials, self.sink), query)

    def _read_first(self, slot: Slot, heads: Tensor, tokens: Entries, sequence: Sequence) -> Partial:
        """By their places: among packed documents any token may be a first one, and a dense look would cost all."""
        start = sequence.position.new_zeros(*sequence.position.shape, 1, 1)
        length = min(self.config.first, tokens.position.shape[1])
        choice = ranges.find(tokens, start, length, sequence, slot.beyond)
        key, value = self.keys_values(tokens)
        out, lse, _ = gathered.core(heads, (key,), choice, self.scale, value=value)
        return out, lse


def _at(tokens: Entries, last: Tensor) -> Entries:
    """The entries of these tokens in hand, last: [B, N], -1 for none."""
    place = last.clamp_min(0)

    def taken(values: Tensor) -> Tensor:
        index = place.view(*place.shape, *[1] * (values.dim() - 2))
        return values.gather(1, index.expand(-1, -1, *values.shape[2:]))

    parts = {name: taken(part) for name, part in tokens.parts.items()}
    return Entries(parts, taken(tokens.position), taken(tokens.document).masked_fill(last < 0, NOTHING))
