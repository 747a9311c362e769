"""Grouped latent attention (arXiv 2505.21487, section 3.2): MLA with several latents, each read by a group of heads.

Each latent is narrower than MLA's one, and a rank of tensor parallelism needs only the latents of its heads. The
rotated key is still one for all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.attention import mla
from models.contract import Entries, Part, Sequence, Slot, State, at_tokens
from models.linear import Linear


@dataclass(frozen=True)
class Config(mla.Config):
    """As mla's, where latent is the size of one latent. latents: how many a token leaves."""

    latents: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latents < 1 or self.heads % self.latents:
            raise ValueError(f"heads ({self.heads}) must be a multiple of latents ({self.latents})")

    def build(self, width: int, *, writes: bool = True, reads: bool = True) -> GLA:
        return GLA(self, width, writes, reads)


class GLA(mla.MLA):
    """Cached: the latents, and the rotated key."""

    config: Config

    def __init__(self, config: Config, width: int, writes: bool, reads: bool = True) -> None:
        super().__init__(config, width, writes, reads)
        if writes:
            rows = (*[config.latent] * config.latents, config.rope_dim)
            self.latent = Linear(width, sum(rows), ("latent", "width"), bias=config.bias, split=rows)

    def slots(self) -> tuple[Slot, ...]:
        (slot,) = super().slots()
        dims = (("kv_heads", self.config.latents), ("latent", self.config.latent))
        return (replace(slot, parts=(Part("latent", dims), slot.parts[1])),)

    def write(self, x: Tensor, sequence: Sequence) -> State:
        c = self.config
        latents, key_rope = self.latent(x).split((c.latents * c.latent, c.rope_dim), -1)
        parts = {
            "latent": self.latent_norm(latents.unflatten(-1, (-1, c.latent))),
            "rope": c.rope.rotate(key_rope, sequence.position),
        }
        return {"latent": at_tokens(sequence, parts)}

    def latents(self, entries: Entries) -> Tensor:
        return entries.parts["latent"]

    def expand(self, entries: Entries) -> tuple[Tensor, Tensor]:
        latents = self.latents(entries)
        key, value = (
            torch.einsum("btkc,kgoc->btkgo", latents, weight.unflatten(0, (latents.shape[2], -1))).flatten(2, 3)
            for weight in self._by_head(latents.dtype)
        )
        rope = entries.parts["rope"].unsqueeze(2).expand(-1, -1, key.shape[2], -1)
        return torch.cat((key, rope), -1), value
