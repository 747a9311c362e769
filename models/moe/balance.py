"""Losses and the bias rule that keep the experts evenly loaded."""

from __future__ import annotations

import torch
from torch import Tensor

from models.contract import NOTHING, Sequence


def sequence_balance(affinity: Tensor, experts: Tensor, sequence: Sequence) -> Tensor:
    """Sequence-wise balance loss, summed over the rows in hand: Σ_e f_e P_e (DeepSeek-V3, arXiv 2412.19437, eq. 17–20).

    affinity: [B, S, E]; experts: [B, S, k]. f_e is E/k × the share of the row's tokens whose selection holds e, P_e
    the mean of their normalised affinity. f carries no gradient, so a row that is sharded needs totals of f and
    lengths alone.
    """
    num_experts, top_k = affinity.shape[-1], experts.shape[-1]
    real = (sequence.document != NOTHING).to(affinity.dtype)
    load = torch.zeros_like(affinity[:, 0]).scatter_add(
        1, experts.flatten(1), real[..., None].expand_as(experts).flatten(1)
    )
    tokens = sequence.total(real.sum(1, keepdim=True), "sequence").clamp_min(1)
    frequency = sequence.total(load, "sequence") * num_experts / (top_k * tokens)
    share = affinity / affinity.sum(-1, keepdim=True)
    probability = (share * real[..., None]).sum(1) / tokens
    return (frequency * probability).sum()


def router_z(logits: Tensor, sequence: Sequence) -> Tensor:
    """Router z-loss, summed over the tokens in hand: logsumexp(logits)² (ST-MoE, arXiv 2202.08906, eq. 5). [B, S,
    E]."""
    real = (sequence.document != NOTHING).to(logits.dtype)
    return (torch.logsumexp(logits, -1).square() * real).sum()


def bias_step(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    """The next selection bias: up by `rate` for experts below the mean load, down above (arXiv 2408.15664). All [E]."""
    # compared as integers: float32 loses counts above 2²⁴, and with them that equal loads are equal
    return bias + rate * torch.sign(load.sum() - load * load.numel()).to(bias.dtype)
