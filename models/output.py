"""The way out of a scheme: what the heads have read, to the width of the residual stream.

One matrix; or, grouped (DeepSeek-V4 report, arXiv 2606.19348, section 2.3), a bottleneck for each group of heads and
then one matrix for all, which is cheaper where the heads together are much wider than the stream.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from models.linear import GroupedLinear, Linear
from models.parameter import Module


@dataclass(frozen=True)
class Grouped:
    """groups: of neighbouring heads. rank: numbers of a group's bottleneck."""

    groups: int
    rank: int

    def __post_init__(self) -> None:
        if min(self.groups, self.rank) < 1:
            raise ValueError(f"groups ({self.groups}) and rank ({self.rank}) must be positive")

    def check(self, heads: int) -> None:
        """Raises ValueError where the heads cannot be grouped so."""
        if heads % self.groups:
            raise ValueError(f"heads ({heads}) must be a multiple of output.groups ({self.groups})")


class GroupedOutput(Module):
    """[..., heads · head_dim] to [..., D]."""

    def __init__(self, config: Grouped, inputs: int, width: int, *, bias: bool = False) -> None:
        super().__init__()
        self.narrow = GroupedLinear(config.groups, inputs // config.groups, config.rank)
        self.wide = Linear(config.groups * config.rank, width, ("width", "latent"), "output", bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.wide(self.narrow(x))
        return y

    def flops(self) -> float:
        """Per token."""
        return self.narrow.flops() + self.wide.flops()


def build(config: Grouped | None, inputs: int, width: int, *, bias: bool = False) -> Linear | GroupedOutput:
    """The one matrix where config is None."""
    if config is None:
        return Linear(inputs, width, ("width", "heads"), "output", bias=bias)
    return GroupedOutput(config, inputs, width, bias=bias)
