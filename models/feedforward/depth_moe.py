"""ZAYA1's mixture of experts (arXiv 2605.05365): one expert a token, chosen by a router that hears the layer before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conf.schema import at_least
from models.contract import FeedForward, Result, Sequence
from models.moe import dispatch
from models.moe.depth_router import DepthRouter
from models.moe.experts import Experts

STATE = "router state"
"""The name under which a router hands its state on."""


@dataclass(frozen=True)
class Config:
    """hidden: width of one expert. router_hidden: of the router. first: no layer before this one has such a router.

    bias_rate: learning rate of the balancing biases.
    """

    experts: int
    hidden: int
    router_hidden: int
    first: bool = False
    norm_eps: float = 1e-5
    bias_rate: float = 1e-3

    def __post_init__(self) -> None:
        if min(self.experts, self.hidden, self.router_hidden) < 1:
            raise ValueError("experts, hidden and router_hidden must be positive")
        at_least(0, self, "norm_eps", "bias_rate")

    def build(self, width: int) -> DepthMoE:
        return DepthMoE(self, width)


class DepthMoE(FeedForward):
    """Router and experts."""

    provides = (STATE,)

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        c = self.config = config
        self.needs = () if c.first else (STATE,)
        self.router = DepthRouter(width, c.router_hidden, c.experts, c.norm_eps, first=c.first)
        self.experts = Experts(width, c.hidden, c.experts)

    def forward(self, x: Tensor, sequence: Sequence, carried: Mapping[str, Any]) -> Result:
        """Reports the load [E + 1], the last of it the tokens that skip."""
        choice = self.router(x, None if self.config.first else carried[STATE])
        order = dispatch.by_expert(choice.expert, self.config.experts)
        rows = self.experts(dispatch.spread(x.flatten(0, 1), order), order.load)
        y = dispatch.gather(rows, choice.weight, order).view_as(x)
        return Result(y, report={"load": choice.load}, provided={STATE: choice.state})

    def idle(self) -> int:
        """The experts that were not chosen."""
        routed = sum(parameter.numel() for parameter in self.experts.parameters())
        return routed - routed // self.config.experts

    @torch.no_grad()
    def update_bias(self, load: Tensor) -> None:
        self.router.update_bias(load, self.config.bias_rate)

    def flops(self) -> float:
        """Per token."""
        return self.router.flops() + self.experts.flops()
