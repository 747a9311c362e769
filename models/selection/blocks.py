"""Blocks of tokens, chosen by how much a compressed look at them weighs (NSA, arXiv 2502.11089, equations 8 to 11).

The mass that a query gives to an entry of `span` tokens counts for the blocks of `size` tokens, once for each `stride`
tokens that both cover, which is what equation 9 adds up. The query heads of a KV head vote together, so that they read
the same blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.contract import Entries, Sequence, Slot, Visibility
from models.selection.index import tiles
from models.selection.teacher import Attended
from models.selection.top import top


@dataclass(frozen=True)
class BlockChoice:
    """size: tokens of a block. top_k: blocks that a query reads, among them the `initial` ones of its document and the
    `local` ones up to its own."""

    size: int = 64
    top_k: int = 16
    initial: int = 1
    local: int = 2

    def __post_init__(self) -> None:
        if self.size < 1 or self.initial < 0 or self.local < 1:
            raise ValueError(
                f"size ({self.size}) and local ({self.local}) must be at least 1, initial ({self.initial}) not negative"
            )
        if self.top_k < self.initial + self.local:
            raise ValueError(
                f"top_k ({self.top_k}) must hold the initial ({self.initial}) and local ({self.local}) blocks, which "
                "are always chosen"
            )


@torch.no_grad()
def choose(
    choice: BlockChoice, num_blocks: int, attended: Attended, slot: Slot, entries: Entries, sequence: Sequence
) -> Tensor:
    """Numbers of the chosen blocks, counted from the start of the query's document: [B, S, K, top_k], in ascending
    order, NOWHERE after the last. attended: the queries and the keys of `entries`, which `slot` declares.

    Holds [B, H, s, T] for a tile of s queries.
    """
    visibility, stride = Visibility.of(entries, sequence), slot.stride
    begin = entries.position.long() - (slot.span - 1)
    block = (begin // choice.size).clamp(0, num_blocks - 1)
    inside = ((block + 1) * choice.size - begin).clamp(max=slot.span) // stride
    shares = ((block, inside), ((block + 1).clamp(max=num_blocks - 1), slot.span // stride - inside))
    number = torch.arange(num_blocks, device=begin.device)
    chosen = []
    for start, stop, seen in tiles(visibility, entries.position.shape[1], attended.query.shape[2]):
        mask = visibility.queries(start, stop).entries(0, seen).mask()
        mass = attended.rows(start, stop, seen).mass_of_kv_heads(mask).transpose(1, 2)
        scores = mass.new_zeros(*mass.shape[:3], num_blocks)
        for target, share in shares:
            weighed = mass * share[:, None, None].to(mass.dtype)
            scores = scores.scatter_add(-1, target[:, None, None].expand_as(mass), weighed)
        own = (sequence.position[:, start:stop] // choice.size)[:, :, None, None]
        always = (number < choice.initial) | (number > own - choice.local)
        scores = scores.masked_fill(always, float("inf"))
        chosen.append(top(scores, (number <= own).expand_as(scores), choice.top_k))
    return torch.cat(chosen, 1)
