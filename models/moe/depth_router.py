"""ZAYA1's router (arXiv 2511.17127, section II; 2605.05365): a small MLP over a state that is averaged along the depth.

A token goes to one expert, or to none: the last class is to skip. The choice is by probability and a balancing bias,
the weight the probability itself, which is not normalised, or a single choice would have no gradient. Biases follow the
load through Adam's moments, which are a controller's proportional and integral terms; its constants are unpublished,
and these are those of AMD's training code. A skipped token gets nothing, as in Transformers; Zyphra's own code passed
the token through, and the report does not speak of skipping.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from models.linear import Linear, full_precision
from models.norm import RMSNorm
from models.parameter import Module

BETAS = (0.9, 0.999)
EPSILON = 1e-8


class Choice(NamedTuple):
    """expert, weight: [N, 1], weight 0 (at expert 0) where skipped. load: [E + 1] choices, the last of them to skip.

    state: [B, S, R], for the router of the next layer.
    """

    expert: Tensor
    weight: Tensor
    load: Tensor
    state: Tensor


class DepthRouter(Module):
    """x → down → + γ ⊙ the state of the layer before → norm → GELU MLP → softmax over E + 1 classes."""

    bias: Tensor
    bias_mean: Tensor
    bias_square: Tensor
    bias_steps: Tensor
    decay: Tensor

    def __init__(self, width: int, hidden: int, num_experts: int, norm_eps: float, *, first: bool) -> None:
        """first: there is no router before this one."""
        super().__init__()
        self.num_experts, self.first = num_experts, first
        self.down = Linear(width, hidden, ("router", "width"), "router", bias=True, fp32=True)
        if not first:
            self.declare("decay", (hidden,), ("router",), "gain", fp32=True)
        self.norm = RMSNorm(hidden, norm_eps, "router")
        self.hidden_1 = Linear(hidden, hidden, ("router", "router"), "router", bias=True, fp32=True)
        self.hidden_2 = Linear(hidden, hidden, ("router", "router"), "router", bias=True, fp32=True)
        self.logits = Linear(hidden, num_experts + 1, ("experts", "router"), "router", fp32=True)
        for name in ("bias", "bias_mean", "bias_square"):
            self.register_buffer(name, torch.zeros(num_experts + 1))
        self.register_buffer("bias_steps", torch.zeros(1))

    def start_buffers(self, generator: torch.Generator) -> None:
        """Nobody skips at first: a probability less one is never the largest."""
        super().start_buffers(generator)
        self.bias[-1] = -1.0

    def forward(self, x: Tensor, before: Tensor | None) -> Choice:
        """x: [B, S, D]; before: [B, S, R], unless this router is the first."""
        state = self.down(x)
        if before is not None:
            state = state + before * self.decay.to(state.dtype)
        hidden = F.gelu(self.hidden_2(F.gelu(self.hidden_1(self.norm(state)))))
        probability = self.logits(hidden).softmax(-1).flatten(0, 1)
        chosen = (probability.detach() + self.bias.to(probability.dtype)).argmax(-1, keepdim=True)
        skipped = chosen == self.num_experts
        weight = probability.gather(1, chosen).masked_fill(skipped, 0)
        load = torch.zeros(self.num_experts + 1, dtype=torch.int64, device=x.device)
        load = load.scatter_add(0, chosen.flatten(), torch.ones_like(chosen.flatten()))
        return Choice(chosen.masked_fill(skipped, 0), weight, load, state)

    @torch.no_grad()
    def update_bias(self, load: Tensor, rate: float) -> None:
        """One step of Adam on each class's share of the load beyond an even one. load: [E + 1], of the global batch."""
        dtype = full_precision(self.bias.dtype)
        excess = load.to(dtype) / load.sum().clamp_min(1) - 1 / load.numel()
        self.bias_steps += 1
        self.bias_mean.lerp_(excess.to(self.bias.dtype), 1 - BETAS[0])
        self.bias_square.lerp_(excess.square().to(self.bias.dtype), 1 - BETAS[1])
        mean = self.bias_mean / (1 - BETAS[0] ** self.bias_steps)
        square = self.bias_square / (1 - BETAS[1] ** self.bias_steps)
        self.bias -= rate * mean / (square.sqrt() + EPSILON)

    def flops(self) -> float:
        """Per token."""
        return sum(linear.flops() for linear in (self.down, self.hidden_1, self.hidden_2, self.logits))
