"""Learned positions (arXiv 1706.03762, section 3.5, as GPT-2 has them): a row for each, added to the embedding."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from conf.schema import Refused
from models.contract import NOTHING, Sequence
from models.parameter import Module


class Positions(Module):
    """Rows by a token's place in its document; there are no others."""

    weight: Tensor

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.rows = rows
        self.declare("weight", (rows, width), ("positions", "width"), "embedding")

    def forward(self, embedded: Tensor, sequence: Sequence) -> Tensor:
        """embedded: [B, S, D]. Raises Refused for rows longer than the table."""
        self.refuse_longer(embedded.shape[1])
        # padding after a cached row's own tokens may lie beyond the table
        position = torch.where(sequence.document == NOTHING, 0, sequence.position)
        return embedded + F.embedding(position, self.weight).to(embedded.dtype)

    def refuse_longer(self, tokens: int) -> None:
        """Raises Refused where so many tokens have no positions."""
        if tokens > self.rows:
            raise Refused(
                f"the model has learned positions for {self.rows} tokens, but {tokens} are given; give fewer."
            )
