"""The decode cache: exactly the entries and tails that the schemes declare, and the sequence that reads and fills them.

Ragged batches: every row has its own length. The tokens in hand are left-aligned; places after a row's own tokens have
the document NOTHING, leave nothing behind and see nothing. Entries carry their positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from models.contract import NOTHING, Entries, Pieces, Sequence, Slot, State
from models.linear import full_precision
from models.model import Model
from models.sequence import local_counts, local_readers


@dataclass
class Store:
    """One slot of one layer. parts: by name, [B, capacity, *dims]; position: [B, capacity], NOTHING where empty.

    count: [B], entries written so far (unbounded slots fill places in order; bounded ones are rings by position).
    """

    slot: Slot
    parts: dict[str, Tensor]
    position: Tensor
    count: Tensor

    @classmethod
    def empty(cls, slot: Slot, num_rows: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Store:
        capacity = slot.entries(tokens)

        formats = {"fp32": full_precision(dtype), "fp8": torch.float8_e4m3fn}

        def allocate(part_format: str, shape: tuple[int, ...]) -> Tensor:
            # zeros, not empty: a place without an entry has softmax weight 0, and 0 × NaN would be NaN
            return torch.zeros(num_rows, capacity, *shape, dtype=formats.get(part_format, dtype), device=device)

        return cls(
            slot,
            {part.name: allocate(part.format, part.shape) for part in slot.parts},
            torch.full((num_rows, capacity), NOTHING, dtype=torch.int64, device=device),
            torch.zeros(num_rows, dtype=torch.int64, device=device),
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of the stored parts, as allocated."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())

    def entries(self) -> Entries:
        return Entries(dict(self.parts), self.position, self.position.clamp(max=0))

    def append(self, new: Entries) -> Entries:
        """Write the valid ones of `new` ([B, T']); returns everything that the tokens in hand may read."""
        valid = new.document != NOTHING
        if self.slot.reach is None:
            place = self.count[:, None] + valid.cumsum(1) - 1
            self._write(new, valid, place)
            self.count += valid.sum(1)
            return self.entries()
        # a chunk may overwrite in the ring what its own first tokens still read: they read the old ring and the chunk
        old = self.entries()
        readable = Entries({k: v.clone() for k, v in old.parts.items()}, old.position.clone(), old.document.clone())
        capacity = self.position.shape[1]
        newest = torch.where(valid, new.position, NOTHING).amax(1, keepdim=True)
        kept = valid & (new.position > newest - capacity * self.slot.stride)
        self._write(new, kept, new.position // self.slot.stride % capacity)
        return readable.concatenate(Entries(new.parts, new.position, torch.where(valid, 0, NOTHING)))

    def drop(self, which: Tensor) -> None:
        """Forget the entries `which` [B, capacity]; the others keep their positions. A row still ends at the tokens
        that the cache was made for. Raises ValueError for a tail."""
        if self.slot.kind == "tail":
            raise ValueError(f"{self.slot.name} is a tail, whose rows the next entry is made of; only entries can go")
        kept = (self.position != NOTHING) & ~which
        position = torch.where(kept, self.position, NOTHING)
        if self.slot.reach is not None:  # a ring's places are a matter of position
            self.position = position
            return
        order = torch.argsort((~kept).to(torch.int8), dim=1, stable=True)
        rows = torch.arange(order.shape[0], device=order.device)[:, None]
        self.parts = {name: part[rows, order] for name, part in self.parts.items()}
        self.position, self.count = position.gather(1, order), kept.sum(1)

    def _write(self, new: Entries, which: Tensor, place: Tensor) -> None:
        row, index = which.nonzero(as_tuple=True)
        target = place[row, index]
        for name, part in self.parts.items():
            part[row, target] = new.parts[name][row, index].to(part.dtype)
        self.position[row, target] = new.position[row, index]


class Cache:
    """What a batch of sequences has left behind, layer by layer."""

    def __init__(self, model: Model, num_rows: int, tokens: int, device: torch.device | str = "cpu") -> None:
        """Room for `tokens` tokens a row, in the model's compute dtype; parts declared fp32 in at least that."""
        self.tokens, self.refuse_longer = tokens, model.refuse_longer
        self.length = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.stores = {
            (sublayer.layer, slot.name): Store.empty(slot, num_rows, tokens, model.compute_dtype, torch.device(device))
            for sublayer in model.attention_sublayers()
            if sublayer.writes
            for slot in sublayer.attention.slots()
        }

    def extend(self, num_new: Tensor, width: int) -> Cached:
        """The sequence of the next tokens: num_new[b] ≤ width of them in row b, left-aligned in [B, width].

        Raises ValueError when a row would outgrow the cache, Refused when it would outgrow the model.
        """
        longest = int((self.length + num_new).max())
        self.refuse_longer(longest)
        if longest > self.tokens:
            raise ValueError(f"the cache holds {self.tokens} tokens a row, and more were given; allocate a larger one")
        offset = torch.arange(width, device=self.length.device).expand(len(self.length), width)
        document = torch.where(offset < num_new[:, None], 0, NOTHING)
        cached = Cached(self, self.length[:, None] + offset, document, num_new)
        self.length = self.length + num_new
        return cached

    def num_bytes(self) -> dict[str, int]:
        """Allocated bytes: `entries` grow with the tokens, `windows` are bounded by a reach or a limit, `tails` by a
        rate."""
        total = {"entries": 0, "windows": 0, "tails": 0}
        for store in self.stores.values():
            bounded = "entries" if store.slot.grows else "windows"
            total["tails" if store.slot.kind == "tail" else bounded] += store.num_bytes
        return total

    def state_dict(self) -> dict[str, Tensor]:
        """Everything in it, to be saved, restored and appended to."""
        return {name: tensor.clone() for name, tensor in self._tensors().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises ValueError for the state of a cache of other shapes; one row would be spread over all."""
        tensors = self._tensors()
        if {name: tensor.shape for name, tensor in state.items()} != {name: t.shape for name, t in tensors.items()}:
            raise ValueError("a saved cache is of another model, number of rows or number of tokens than this one")
        for name, tensor in tensors.items():
            tensor.copy_(state[name])

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"length": self.length}
        for (layer, slot), store in self.stores.items():
            name = f"{layer}.{slot}"
            tensors |= {f"{name}.{part}": value for part, value in store.parts.items()}
            tensors |= {f"{name}.@position": store.position, f"{name}.@count": store.count}
        return tensors


class Cached:
    """The tokens in hand, after those that the cache already knows."""

    documents: int | None = None

    def __init__(self, cache: Cache, position: Tensor, document: Tensor, num_new: Tensor, layer: int = 0) -> None:
        self.cache, self.position, self.document, self.num_new, self.layer = cache, position, document, num_new, layer
        self.counts = local_counts(position)
        self.prepared: dict[int | None, Any] = {}

    def at(self, layer: int) -> Sequence:
        return Cached(self.cache, self.position, self.document, self.num_new, layer)

    def before(self, slot: Slot, rows: Tensor) -> tuple[Tensor, Tensor]:
        store = self.cache.stores[self.layer, slot.name]
        (name,) = store.parts
        tail = store.parts[name]
        past, present = tail.clone(), store.position != NOTHING
        extended = torch.cat((past, rows), 1)
        position = torch.cat((store.position, self.position), 1)
        newest = self.num_new[:, None] + torch.arange(slot.rows, device=rows.device)
        store.parts[name] = extended.gather(1, newest.view(*newest.shape, *[1] * (rows.dim() - 2)).expand_as(tail))
        store.position = position.gather(1, newest)
        return past, present

    def collect(self, slots: tuple[Slot, ...], state: State) -> Pieces:
        return {name: [self.cache.stores[self.layer, name].append(entries)] for name, entries in state.items()}

    def readers(self, lead: int) -> Tensor:
        return local_readers(self.position, self.document, lead)

    def total(self, value: Tensor, axis: Literal["sequence", "heads"]) -> Tensor:
        return value.detach()
