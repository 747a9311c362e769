"""One projection for keys and values, as in Gemma 4's full layers (arXiv 2607.02770; `attention_k_eq_v`).

Of u = W x, normalised to û, a head's value is û, and its key RoPE(û ⊙ gain): the value holds all that the key is made
of. So either both are cached, or the value alone, which halves the cache; then each read multiplies and rotates
all cached entries again, and a layer that reads another's state has a key gain of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from models.attention import gqa
from models.contract import Entries, Slot
from models.linear import Linear
from models.norm import Gain, unit_rms


@dataclass(frozen=True)
class Config(gqa.Config):
    """As gqa's, where the norms are no option. keeps: what is cached, keys and values or values alone."""

    qk_norm: bool = True
    value_norm: bool = True
    keeps: Literal["both", "value"] = "both"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.qk_norm and self.value_norm):
            raise ValueError("qk_norm and value_norm must be true: one norm makes the key and the value of a head")

    def build(self, width: int, *, writes: bool = True, reads: bool = True) -> TiedKV:
        return TiedKV(self, width, writes, reads)


class TiedKV(gqa.GQA):
    """Grouped-query attention whose values are its keys, before gain and rotation."""

    config: Config
    key_norm: Gain

    def build_state(self) -> None:
        c = self.config
        if self.writes:
            self.key = Linear(self.width, c.kv_heads * c.head_dim, ("kv_heads", "width"), bias=c.bias)
        if self.writes if c.keeps == "both" else self.reads:  # whoever makes the keys
            self.key_norm = Gain(c.head_dim, "head_dim", self.first_gain())

    def slots(self) -> tuple[Slot, ...]:
        (both,) = super().slots()
        return (both if self.config.keeps == "both" else replace(both, parts=both.parts[1:]),)

    def leave(self, x: Tensor, position: Tensor) -> dict[str, Tensor]:
        value = unit_rms(self.heads(self.key(x)), self.config.norm_eps)
        if self.config.keeps == "value":
            return {"value": value}
        return {"key": self.rotated(self.key_norm(value), position), "value": value}

    def keys_values(self, kv: Entries) -> tuple[Tensor, Tensor]:
        if self.config.keeps == "value":
            return self.rotated(self.key_norm(kv.parts["value"]), kv.position), kv.parts["value"]
        return super().keys_values(kv)
