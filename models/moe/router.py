"""Which experts a token goes to, and with which weights: top-k of an affinity, group-limited, bias-corrected; or a
table.

Switch and Mixtral (arXiv 2401.04088) take the softmax; DeepSeek-V3 (arXiv 2412.19437, section 2.1.2) the sigmoid, a
bias that enters the selection only, and groups of experts of which the best few are kept; DeepSeek-V4 (report, arXiv
2606.19348, section 2.1) the root of the softplus, and in its first layers a table by token id.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from conf.schema import at_least
from models.linear import Linear, full_precision
from models.moe.hashed import Table
from models.parameter import Module
from models.selection import selected


@dataclass(frozen=True)
class Config:
    """normalise: weights of the chosen experts sum to one before `scaling`. bias: a selection-only bias that whoever
    trains updates from the load. groups, kept_groups: experts are chosen within the best `kept_groups` of `groups`
    groups, a group's score being the sum of its two best experts'. hash_vocab: where it is given, a table of so many
    token ids says which experts, and the affinity their weights alone."""

    affinity: Literal["softmax", "sigmoid", "sqrt_softplus"] = "softmax"
    normalise: bool = True
    scaling: float = 1.0
    bias: bool = False
    groups: int = 1
    kept_groups: int = 1
    hash_vocab: int | None = None

    def __post_init__(self) -> None:
        if self.hash_vocab is not None and (self.bias or self.groups > 1):
            raise ValueError("with hash_vocab a table chooses the experts: neither a bias nor groups have a say")
        if self.hash_vocab is not None and self.hash_vocab < 1:
            raise ValueError(
                f"hash_vocab ({self.hash_vocab}) must be the vocabulary's size; leave it null for no table"
            )
        at_least(0, self, "scaling")


class Routing(NamedTuple):
    """experts, weights: [N, k]. affinity: [N, E] before selection. logits: [N, E]."""

    experts: Tensor
    weights: Tensor
    affinity: Tensor
    logits: Tensor


class Router(Module):
    """Computed in fp32 throughout. Ties go to the expert with the lowest index."""

    def __init__(self, config: Config, width: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.config, self.num_experts, self.top_k = config, num_experts, top_k
        self.logits = Linear(width, num_experts, ("experts", "width"), "router", fp32=True)
        self.bias: Tensor | None
        # a buffer: it takes no gradient, but it is part of the model and of its checkpoints
        self.register_buffer("bias", torch.zeros(num_experts) if config.bias else None)
        self.table = None if config.hash_vocab is None else Table(config.hash_vocab, num_experts, top_k)

    def forward(self, x: Tensor, ids: Tensor | None = None) -> Routing:
        """x: [N, D]; ids: [N], for a table."""
        logits = self.logits(x)
        affinity = AFFINITIES[self.config.affinity](logits)
        if self.table is None:
            experts = selected(self._select(affinity.detach()))
        else:
            assert ids is not None
            experts = self.table(ids)
        weights = affinity.gather(1, experts)
        if self.config.normalise:
            # the epsilon of DeepSeek's code; it vanishes beside a softmax
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Routing(experts, weights * self.config.scaling, affinity, logits)

    def _select(self, affinity: Tensor) -> Tensor:
        score = affinity if self.bias is None else affinity + self.bias.to(affinity.dtype)
        if self.config.groups > 1:
            grouped = score.unflatten(1, (self.config.groups, -1))
            group_score = _top(grouped, min(2, grouped.shape[-1]))[0].sum(-1)
            kept = _top(group_score, self.config.kept_groups)[1]
            mask = torch.zeros_like(group_score, dtype=torch.bool).scatter(1, kept, True)
            score = grouped.masked_fill(~mask[..., None], float("-inf")).flatten(1)
        return _top(score, self.top_k)[1]

    def flops(self) -> float:
        """Per token."""
        return self.logits.flops()


def sqrt_softplus(logits: Tensor) -> Tensor:
    """√log(1 + eˣ). Far below zero that is e^(x/2), whose gradient is finite: softplus underflows, and the derivative
    of the root at 0 is not a number."""
    low = logits < -40
    root = F.softplus(logits.masked_fill(low, 0.0)).sqrt()
    return torch.where(low, torch.exp(logits.clamp(max=-40) / 2), root)


AFFINITIES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrt_softplus": sqrt_softplus,
}


def _top(score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of the last dim, ties to the lowest index (topk promises no order among equals)."""
    values, index = score.to(full_precision(score.dtype)).sort(dim=-1, descending=True, stable=True)
    return values[..., :k], index[..., :k]
