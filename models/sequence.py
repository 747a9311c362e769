"""Whole rows in one process: the sequence of plain training and evaluation."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from models.contract import NOTHING, Pieces, Sequence, Slot, State


class Whole:
    """Every row is here from its start; nothing lies before the tokens in hand, nothing is elsewhere."""

    def __init__(
        self,
        position: Tensor,
        document: Tensor,
        *,
        documents: int | None = None,
        counts: dict[str, Tensor] | None = None,
        readers: dict[int, Tensor] | None = None,
    ) -> None:
        """position, document: [B, S] integers. documents: no row has more; None if unknown. counts, and readers by
        `lead`, default to those of these rows alone."""
        self.position = position
        self.document = document
        self.documents = documents
        self.counts = counts or local_counts(position)
        self._readers = readers
        self.prepared: dict[int | None, Any] = {}

    @classmethod
    def rows(cls, num_rows: int, length: int, device: torch.device | str = "cpu") -> Whole:
        """`num_rows` rows of one document of `length` tokens each."""
        position = torch.arange(length, device=device).expand(num_rows, length)
        return cls(position, torch.zeros_like(position), documents=1)

    def at(self, layer: int) -> Sequence:
        return self

    def before(self, slot: Slot, rows: Tensor) -> tuple[Tensor, Tensor]:
        batch = rows.shape[0]
        past = rows.new_zeros(batch, slot.rows, *rows.shape[2:])
        return past, torch.zeros(batch, slot.rows, dtype=torch.bool, device=rows.device)

    def collect(self, slots: tuple[Slot, ...], state: State) -> Pieces:
        return {name: [entries] for name, entries in state.items()}

    def readers(self, lead: int) -> Tensor:
        return local_readers(self.position, self.document, lead) if self._readers is None else self._readers[lead]

    def total(self, value: Tensor, axis: Literal["sequence", "heads"]) -> Tensor:
        return value.detach()


def local_counts(position: Tensor) -> dict[str, Tensor]:
    """Counts of the rows [B, S] in hand, as if they were all there is."""
    batch, length = position.shape

    def scalar(value: int) -> Tensor:
        return torch.tensor(float(value), device=position.device)

    return {"tokens": scalar(batch * length), "sequences": scalar(batch)}


def local_readers(position: Tensor, document: Tensor, lead: int) -> Tensor:
    """How many of the tokens [B, S] in hand see an entry of a slot whose first one needs `lead` tokens: those at or
    after its end."""
    return ((position >= lead - 1) & (document != NOTHING)).sum()
