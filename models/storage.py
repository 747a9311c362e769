"""In which formats a cache is stored: as its slots declare, as the kernels of their authors pack it, or as one asks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from models.contract import BYTES, Packing, Part, Slot

DECLARED, PACKED = "declared", "packed"

FORMATS = (*BYTES, DECLARED, PACKED)
"""What a part may be stored in: one format without scales, what its slot declares, or how its authors pack it."""


@dataclass(frozen=True)
class Storage:
    """entries: of every entry. named: of the slots, or parts of slots (SLOT.PART), that are named; the exacter name
    wins. Tails are sums in the making and stay as declared, unless they are named."""

    entries: str = DECLARED
    named: Mapping[str, str] = field(default_factory=dict)

    def layout(self, slot: Slot, part: Part) -> Packing:
        """(format, how many numbers of it), scales and padding included."""
        whole = self.entries if slot.kind == "entry" else DECLARED
        wanted = self.named.get(f"{slot.name}.{part.name}", self.named.get(slot.name, whole))
        if wanted == PACKED and part.packed:
            return part.packed
        return ((wanted if wanted in BYTES else part.format, part.numbers),)

    def bytes(self, slot: Slot) -> float:
        """Of one entry, or of one row of a tail."""
        return sum(BYTES[number_format] * numbers for number_format, numbers in self._layouts(slot))

    def format(self, slot: Slot) -> str:
        """In which most of its numbers are stored."""
        return max(self._layouts(slot), key=lambda layout: layout[1])[0]

    def _layouts(self, slot: Slot) -> list[tuple[str, int]]:
        return [layout for part in slot.parts for layout in self.layout(slot, part)]


def names(slots: Iterable[Slot]) -> list[str]:
    """By which formats can be asked for, sorted."""
    slots = list(slots)
    parts = {f"{slot.name}.{part.name}" for slot in slots for part in slot.parts}
    return sorted(parts | {slot.name for slot in slots})
