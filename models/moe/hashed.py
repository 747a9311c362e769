"""Experts by token id, from a table that is never trained: hash layers (arXiv 2106.04426; DeepSeek-V4 report, arXiv
2606.19348, section 2.1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from models.parameter import Module


class Table(Module):
    """experts: [vocab, k], k different experts for each token id."""

    experts: Tensor

    def __init__(self, vocab: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        # a buffer: it takes no gradient, but it is part of the model and of its checkpoints
        self.register_buffer("experts", torch.empty(vocab, top_k, dtype=torch.int64))

    def forward(self, ids: Tensor) -> Tensor:
        """ids: [N]. Returns [N, k]."""
        return self.experts[ids]

    def start_buffers(self, generator: torch.Generator) -> None:
        """Deal the experts out, pack after shuffled pack.

        How DeepSeek made its table is not published. Here neighbouring ids load all experts evenly; as tokenizers
        number their tokens roughly by frequency, that balances the load too.
        """
        vocab, top_k = self.experts.shape
        ids_per_pack = math.lcm(self.num_experts, top_k) // top_k
        packs = torch.rand(-(-vocab // ids_per_pack), self.num_experts, generator=generator, device="cpu").argsort(1)
        ids = torch.arange(vocab, device="cpu")
        dealt = (ids % ids_per_pack * top_k)[:, None] + torch.arange(top_k, device="cpu")
        self.experts.copy_(packs[ids // ids_per_pack].gather(1, dealt % self.num_experts))
