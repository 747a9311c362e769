"""The one contract: a compression scheme says what a token leaves behind, and how that is read.

    compress(x, sequence) -> query, state    the query is used at once; the state is kept, shared, cached or sent
    attend(query, pieces, sequence) -> y     pieces: the state as `sequence.collect` returned it
    slots() -> (Slot, ...)                   what the state is made of; the cache, the cost model, context
                                             parallelism and serving use nothing else
    flops(queries, context, pairs)           what it costs

One rule of visibility holds for every entry. A query may read it if it is valid, if it belongs to the query's document,
and if the last token it covers lies at least `beyond` and fewer than `reach` tokens before the query (0 is the query's
own token). A scheme that needs other tokens asks the `Sequence` for them, so that training on whole rows, training on
shards of rows, and decoding from a cache are one code path.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from models.mode import Mode
from models.parameter import Module

NOTHING = -1
"""The document of an entry that is not there, and of a token that is padding."""

BYTES = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0, "fp4": 0.5}
"""Bytes of one stored number, by format."""

Packing = tuple[tuple[str, int], ...]
"""Pairs of a format and how many numbers have it, scales and padding included."""


@dataclass(frozen=True)
class Part:
    """One tensor of an entry: its logical dims with their sizes, and the format in which it is stored.

    packed: the formats that the authors' own serving kernels use instead; () if these store it as `format` says.
    """

    name: str
    dims: tuple[tuple[str, int], ...]
    format: str = "bf16"
    packed: Packing = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(size for _, size in self.dims)

    @property
    def numbers(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Slot:
    """One kind of thing that tokens leave behind.

    kind: queries read an `entry`; a `tail` holds the last rows that a compression still needs.
    stride: tokens from one entry to the next. span: tokens that an entry covers.
    origin: the token of a document at which its first entry's span begins. It is negative if that span begins before
    the document does; the entry then covers only the tokens that exist.
    limit: only the first so many entries of a document exist (None: all).
    beyond, reach: an entry is read from `beyond` tokens back on, up to fewer than `reach` (None: to the start).
    chosen: a query reads at most so many of the visible entries (None: all).
    rows: length of a tail, in tokens.
    """

    name: str
    parts: tuple[Part, ...]
    kind: Literal["entry", "tail"] = "entry"
    stride: int = 1
    span: int = 1
    origin: int = 0
    limit: int | None = None
    beyond: int = 0
    reach: int | None = None
    chosen: int | None = None
    rows: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for a slot that cannot be, or whose entries cannot be counted."""
        of_entries = (self.stride, self.span, self.origin, self.limit, self.beyond, self.reach, self.chosen)
        if self.kind == "tail":
            wrong = {
                f"rows ({self.rows}) must be at least 1 in a tail": self.rows < 1,
                "a tail has rows alone; all other sizes are of entries": of_entries != (1, 1, 0, None, 0, None, None),
            }
        else:
            counts = [n for n in (self.stride, self.span, self.limit, self.chosen) if n is not None]
            bounded = self.reach is not None or self.limit is not None
            wrong = {
                f"rows ({self.rows}) are a tail's": self.rows != 0,
                "stride, span, limit and chosen must be at least 1": min(counts) < 1,
                f"its first entry ends before a document begins (origin + span is {self.lead})": self.lead < 1,
                f"beyond ({self.beyond}) must be at least 0": self.beyond < 0,
                f"reach ({self.reach}) must exceed beyond ({self.beyond}), or nothing is ever read": (
                    self.reach is not None and self.reach <= self.beyond
                ),
                "with chosen, every entry before the query is a candidate: neither reach nor limit": (
                    self.chosen is not None and bounded
                ),
            }
        for sentence, holds in wrong.items():
            if holds:
                raise ValueError(f"slot {self.name!r}: {sentence}")

    @property
    def lead(self) -> int:
        """Tokens that a document must have before its first entry exists; the next comes `stride` tokens later."""
        return self.origin + self.span

    @property
    def grows(self) -> bool:
        """Whether its cache grows with every further token."""
        return self.kind == "entry" and self.reach is None and self.limit is None

    def entries(self, tokens: int) -> int:
        """How many entries (or tail rows) `tokens` tokens of one document leave in a cache."""
        if self.kind == "tail":
            return self.rows
        complete = max(0, (tokens - self.lead) // self.stride + 1)
        held = complete if self.limit is None else min(complete, self.limit)
        return held if self.reach is None else min(held, -(-self.reach // self.stride))

    def serves(self, reader: Slot) -> bool:
        """Whether a cache of this slot has all that `reader` reads: the same entries, kept for at least as long."""
        long_enough = self.reach is None or (reader.reach is not None and reader.reach <= self.reach)
        return long_enough and self._kept() == reader._kept()

    def _kept(self) -> Slot:
        """The slot without what depends on its reader."""
        return replace(self, beyond=0, reach=None, chosen=None)


@dataclass(frozen=True)
class Entries:
    """What some consecutive tokens left in one slot.

    parts: by part name, each [B, T, *dims]. position: [B, T], the position in its document of the last token that an
    entry covers. document: [B, T], NOTHING where there is no entry. aligned: entry j belongs to token j in hand.
    """

    parts: dict[str, Tensor]
    position: Tensor
    document: Tensor
    aligned: bool = False

    def concatenate(self, other: Entries) -> Entries:
        """Both, one after the other along T; the result is not aligned."""
        return Entries(
            {name: torch.cat((part, other.parts[name]), 1) for name, part in self.parts.items()},
            torch.cat((self.position, other.position), 1),
            torch.cat((self.document, other.document), 1),
        )


State = dict[str, Entries]
"""By slot name."""

Pieces = dict[str, list[Entries]]
"""By slot name: one piece, or several whose softmaxes are merged by their log-sum-exp."""


class Sequence(Protocol):
    """Where the tokens in hand stand, and how to reach what other tokens left.

    position, document: [B, S]. documents: no row has more, and where it is 1, each is one from its start; known without
    a device sync, or None. counts: the "tokens" and "sequences" of the global batch, scalar tensors known before the
    forward, by which losses divide. prepared: by reach, what a core made of these tokens before the forward.
    """

    position: Tensor
    document: Tensor
    documents: int | None
    counts: dict[str, Tensor]
    prepared: dict[int | None, Any]

    def at(self, layer: int) -> Sequence:
        """The same sequence as layer `layer` sees it: with that layer's cached state."""
        ...

    def before(self, slot: Slot, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The last `slot.rows` rows before the tokens in hand. rows: those of the tokens in hand, [B, S, ...].

        Returns [B, slot.rows, ...] and `present` [B, slot.rows], which is False for a row that does not exist: one
        before the start of the sequence, or before the document of the first token in hand.
        """
        ...

    def collect(self, slots: tuple[Slot, ...], state: State) -> Pieces:
        """All entries that the tokens in hand may read: their own, and other tokens'."""
        ...

    def readers(self, lead: int) -> Tensor:
        """How many tokens of the global batch see at least one entry of a slot with this `lead`.

        A scalar known before the forward; a loss over queries divides by it.
        """
        ...

    def total(self, value: Tensor, axis: Literal["sequence", "heads"]) -> Tensor:
        """The sum over all shards of `axis`, without a gradient."""
        ...


@dataclass(frozen=True)
class Visibility:
    """Which entries each query may read. A core evaluates the rule only where, and when, it needs it."""

    query_position: Tensor
    query_document: Tensor
    position: Tensor
    document: Tensor
    reach: int | None = None
    beyond: int = 0
    aligned: bool = False
    single_document: bool = False
    prepared: Any = None

    @classmethod
    def of(cls, entries: Entries, sequence: Sequence, reach: int | None = None, beyond: int = 0) -> Visibility:
        return cls(
            sequence.position,
            sequence.document,
            entries.position,
            entries.document,
            reach,
            beyond,
            entries.aligned and not beyond,
            sequence.documents == 1,
            sequence.prepared.get(reach) if entries.aligned and not beyond else None,
        )

    def queries(self, start: int, stop: int) -> Visibility:
        """The same rule for queries start..stop only."""
        return replace(
            self, query_position=self.query_position[:, start:stop], query_document=self.query_document[:, start:stop]
        )

    def entries(self, start: int, stop: int) -> Visibility:
        """The same rule for entries start..stop only."""
        return replace(self, position=self.position[:, start:stop], document=self.document[:, start:stop])

    def mask(self) -> Tensor:
        """[B, S, T], True where visible."""
        distance = self.query_position[:, :, None] - self.position[:, None, :]
        same = self.query_document[:, :, None] == self.document[:, None, :]
        visible = same & (self.document[:, None, :] != NOTHING) & (distance >= self.beyond)
        return visible if self.reach is None else visible & (distance < self.reach)


PairCount = Callable[[Slot, int, int], float]
"""(slot, queries, context) -> number of (query, entry) pairs that are scored."""


def visible_pairs(slot: Slot, queries: int, context: int) -> float:
    """Pairs that are read, in one document of `context` tokens: each of its last `queries` tokens with the entries that
    it may read, or with those chosen among them."""
    if slot.chosen is not None:
        # the entries of the last `chosen` strides are as many as are chosen
        slot = replace(slot, reach=slot.beyond + slot.chosen * slot.stride, chosen=None)
    return float(_visible_before(slot, context) - _visible_before(slot, context - queries))


def all_pairs(slot: Slot, queries: int, context: int) -> float:
    """Pairs that a plain implementation computes before it masks: every query with every place for an entry."""
    bounds = [bound for bound in (slot.limit, slot.chosen) if bound is not None]
    return float(queries * min([-(-context // slot.stride), *bounds]))


def _visible_before(slot: Slot, tokens: int) -> int:
    """The entries that query t reads, summed over t < tokens: those that end by t − beyond, without those that end by
    t − reach."""

    def ended(queries: int) -> int:
        seeing = max(0, queries - slot.lead + 1)
        growing = seeing if slot.limit is None else min(seeing, slot.limit * slot.stride)
        strides, rest = divmod(growing, slot.stride)
        # for each n, `stride` queries see n entries; all queries after the last entry see the same number
        counted = slot.stride * strides * (strides + 1) // 2 + rest * (strides + 1)
        return counted + (seeing - growing) * (slot.limit or 0)

    return ended(tokens - slot.beyond) - (0 if slot.reach is None else ended(tokens - slot.reach))


@dataclass(frozen=True)
class Flops:
    """Floating-point operations, a multiply-add counted as two."""

    projections: float = 0.0
    scores: float = 0.0
    selection: float = 0.0

    @property
    def total(self) -> float:
        return self.projections + self.scores + self.selection

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.projections + other.projections, self.scores + other.scores, self.selection + other.selection)


Report = dict[str, Tensor]
"""What a layer measured, detached and of fixed shape. The trainer sums it over micro-batches and ranks."""


@dataclass(frozen=True)
class Result:
    """The output of a mechanism.

    y: [B, S, D]. extra: the sum of its auxiliary losses, each coefficient × local sum ÷ global count. provided: what
    later layers read of it, by the names in its `provides`.
    """

    y: Tensor
    extra: Tensor | None = None
    report: Report = field(default_factory=dict)
    provided: dict[str, Any] = field(default_factory=dict)


class Attention(Module):
    """A compression scheme at one depth of a model.

    Built with `writes=False`, it reads another layer's state and has no parameters to make one. Built with
    `reads=False`, it is a writer that stands alone: it only has the parameters that make the state, and only `write`,
    `slots` and `flops` are called. A scheme can be such a writer if neither making nor training its state needs
    queries; its Config then says `stands_alone = True`, and its `build` takes `reads`.
    """

    writes: bool
    reads: bool = True
    core: Callable[..., tuple[Tensor, Tensor | None]]
    mode: Mode = "sparse"

    @abstractmethod
    def compress(self, x: Tensor, sequence: Sequence) -> tuple[Any, State]:
        """x: [B, S, D], normalised. Returns the query, which only `attend` reads, and the state; a reader leaves {}."""

    @abstractmethod
    def attend(self, query: Any, pieces: Pieces, sequence: Sequence) -> Result:
        """Read the pieces."""

    def write(self, x: Tensor, sequence: Sequence) -> State:
        """Only the state. x: [B, S, D], normalised. Raises TypeError if the state cannot be made without queries."""
        raise TypeError(f"the state of {type(self).__name__} is bound to its queries")

    def selector(self) -> tuple[nn.Module, ...]:
        """The modules that choose what is read. A warm-up trains only these; their gradients are clipped separately."""
        return ()

    @abstractmethod
    def slots(self) -> tuple[Slot, ...]:
        """What the state that it reads is made of, whether it or another layer writes it."""

    @abstractmethod
    def flops(self, queries: int, context: int, pairs: PairCount = visible_pairs) -> Flops:
        """Operations for `queries` new tokens, the last of a document of `context`, in as few passes as possible."""


class FeedForward(Module):
    """The part of a layer that treats every token by itself.

    normalises: it has norms of its own, and is given the residual as it is. needs, provides: the names of what it reads
    from, and adds to, what the stream carries; the model provides "ids" [B, S] and "embedding" [B, S, D], scaled.
    vocab: how many token ids it has a table for; None if it does not look at ids.
    """

    normalises: bool = False
    vocab: int | None = None
    needs: tuple[str, ...] = ()
    provides: tuple[str, ...] = ()

    @abstractmethod
    def forward(self, x: Tensor, sequence: Sequence, carried: Mapping[str, Any]) -> Result:
        """x: [B, S, D], normalised unless `normalises`."""

    @abstractmethod
    def flops(self) -> float:
        """Operations per token."""

    def idle(self) -> int:
        """How many parameters one token is not multiplied by, without tables in which it is looked up."""
        return 0

    def update_bias(self, load: Tensor) -> None:
        """Take one step of the selection bias, if there is one. load: [E], of the whole global batch."""


class Preamble(Module):
    """What the injections of all depths share, computed once before the first block.

    provides: the names under which it is carried to the depths that need it.
    """

    provides: tuple[str, ...] = ()

    @abstractmethod
    def forward(self, ids: Tensor, embedded: Tensor) -> dict[str, Any]:
        """ids: [B, S]; embedded: [B, S, D], scaled. Returns what it provides, by name."""


class Residual(Module):
    """How one sublayer reads the residual stream, and how its output is written back.

    compute_dtype: of the sublayer's input; the stream itself may be wider. The model sets it, as it does for `Ends`.
    """

    compute_dtype: torch.dtype

    @abstractmethod
    def read(self, residual: Tensor) -> tuple[Tensor, Any]:
        """Returns the sublayer's input, [B, S, D], and what `write` will need."""

    @abstractmethod
    def write(self, residual: Tensor, carry: Any, y: Tensor) -> Tensor:
        """y: [B, S, D], the sublayer's output. Returns the next residual."""

    def flops(self) -> float:
        """Operations of its matrix products, per token."""
        return 0.0


class Ends(Module):
    """The two ends of the residual stream. streams: how many streams, each of the model's width, it consists of."""

    compute_dtype: torch.dtype
    streams: int = 1

    @abstractmethod
    def enter(self, embedded: Tensor) -> Tensor:
        """[B, S, D] to the residual stream."""

    @abstractmethod
    def leave(self, residual: Tensor) -> Tensor:
        """The residual stream to [B, S, D]."""

    def flops(self) -> float:
        """Operations of its matrix products, per token."""
        return 0.0


def at_tokens(sequence: Sequence, parts: dict[str, Tensor]) -> Entries:
    """One entry for each token in hand; each part is [B, S, *dims]."""
    return Entries(parts, sequence.position, sequence.document, aligned=True)


def _flatten(entries: Entries) -> tuple[list[Any], Any]:
    return [entries.parts, entries.position, entries.document], entries.aligned


def _unflatten(leaves: Any, aligned: Any) -> Entries:
    parts, position, document = leaves
    return Entries(parts, position, document, aligned)


# Wrappers that hook a module's inputs and outputs (FSDP2, recompute, pipeline stages) see tensors only through pytrees.
pytree.register_pytree_node(Entries, _flatten, _unflatten, serialized_type_name="keyhole.Entries")
