"""Mixture of experts, dropless (arXiv 2211.15841), with always-on shared experts (DeepSeekMoE, arXiv 2401.06066)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from conf.schema import at_least
from models import activation
from models.contract import FeedForward, Result, Sequence
from models.feedforward.dense import Dense
from models.moe import balance, dispatch, router
from models.moe.experts import Experts


@dataclass(frozen=True)
class Config:
    """hidden: width of one expert. shared_hidden: width of the shared experts together, 0 for none. clamp: see
    models.activation, for both.

    balance_loss, z_loss: coefficients of the losses in models.moe.balance. bias_rate: γ of the selection bias's update.
    """

    experts: int
    top_k: int
    hidden: int
    shared_hidden: int = 0
    activation: activation.Kind = "silu"
    clamp: float | None = None
    router: router.Config = field(default_factory=router.Config)
    balance_loss: float = 0.0
    z_loss: float = 0.0
    bias_rate: float = 0.001

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k ({self.top_k}) must lie between 1 and experts ({self.experts})")
        if self.hidden < 1 or self.shared_hidden < 0:
            raise ValueError(
                f"hidden ({self.hidden}) must be positive, shared_hidden ({self.shared_hidden}) not negative"
            )
        if self.clamp is not None and self.clamp <= 0:
            raise ValueError(f"clamp ({self.clamp}) must be positive; leave it null for none")
        at_least(0, self, "balance_loss", "z_loss", "bias_rate")
        groups, kept = self.router.groups, self.router.kept_groups
        if groups < 1 or self.experts % groups:
            raise ValueError(f"experts ({self.experts}) must be a multiple of router.groups ({groups})")
        if not 1 <= kept <= groups:
            raise ValueError(f"router.kept_groups ({kept}) must lie between 1 and router.groups ({groups})")
        if self.top_k > self.experts // groups * kept:
            raise ValueError(
                f"top_k ({self.top_k}) exceeds the {self.experts // groups * kept} experts of the kept groups"
            )

    def build(self, width: int) -> MoE:
        return MoE(self, width)


class MoE(FeedForward):
    """Router, experts, shared experts."""

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        c = self.config = config
        self.router = router.Router(c.router, width, c.experts, c.top_k)
        self.vocab = c.router.hash_vocab
        self.needs = () if self.vocab is None else ("ids",)
        gated = activation.gating(c.activation, c.clamp)
        self.experts = Experts(width, c.hidden, c.experts, gated)
        self.shared = Dense(width, c.shared_hidden, gated) if c.shared_hidden else None

    def forward(self, x: Tensor, sequence: Sequence, carried: Mapping[str, Any]) -> Result:
        ids = carried["ids"].flatten() if self.needs else None
        mixed = self.mix(x, self.router(x.flatten(0, 1), ids), sequence)
        return mixed if self.shared is None else replace(mixed, y=mixed.y + self.shared.glu(x))

    def mix(self, x: Tensor, routing: router.Routing, sequence: Sequence) -> Result:
        """x through its experts: [B, S, D]. With the losses of its routing; reports the load [E]."""
        c, (batch, length, _) = self.config, x.shape
        order = dispatch.by_expert(routing.experts, c.experts)
        copies = self.experts(dispatch.spread(x.flatten(0, 1), order), order.load)
        y = dispatch.gather(copies, routing.weights, order).view_as(x)
        extra = None
        # a table's load is what it is: there is nothing that the loss could move
        if c.balance_loss and self.vocab is None:
            affinity = routing.affinity.view(batch, length, -1)
            loss = balance.sequence_balance(affinity, routing.experts.view(batch, length, -1), sequence)
            extra = c.balance_loss * loss / sequence.counts["sequences"]
        if c.z_loss:
            loss = balance.router_z(routing.logits.view(batch, length, -1), sequence)
            z = c.z_loss * loss / sequence.counts["tokens"]
            extra = z if extra is None else extra + z
        return Result(y, extra, {"load": order.load})

    def idle(self) -> int:
        """The experts that were not chosen."""
        routed = sum(parameter.numel() for parameter in self.experts.parameters())
        return routed - routed * self.config.top_k // self.config.experts

    @torch.no_grad()
    def update_bias(self, load: Tensor) -> None:
        """One step of the selection bias, if there is one; load: [E], of the whole global batch."""
        bias = self.router.bias
        if bias is not None:
            bias.copy_(balance.bias_step(bias, load, self.config.bias_rate))

    def flops(self) -> float:
        """Per token."""
        shared = 0.0 if self.shared is None else self.shared.flops()
        return self.router.flops() + self.config.top_k * self.experts.flops() + shared
