"""The experts' matrices over tokens sorted by expert: one grouped GEMM, and the obvious loop that it must equal."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from models.activation import Gating, swiglu
from models.parameter import Module


class Experts(Module):
    """E gated experts (arXiv 2002.05202) of width `hidden`."""

    gate_up: Tensor
    down: Tensor

    def __init__(self, width: int, hidden: int, num_experts: int, gated: Gating = swiglu) -> None:
        super().__init__()
        self.gated = gated
        self.width, self.hidden, self.num_experts = width, hidden, num_experts
        gate_up = (num_experts, 2 * hidden, width)
        self.declare("gate_up", gate_up, ("experts", "hidden", "width"), "expert", split=(hidden, hidden))
        self.declare("down", (num_experts, width, hidden), ("experts", "width", "hidden"), "expert_output")

    def forward(self, x: Tensor, load: Tensor) -> Tensor:
        """x: [N, D], the first load[0] rows for expert 0, and so on; load: [E] integers. Returns [N, D]."""
        gate_up, down = self.gate_up.to(x.dtype), self.down.to(x.dtype)
        return (loop if self.why_loop(x.dtype) else grouped)(x, load, gate_up, down, self.gated)

    def why_loop(self, dtype: torch.dtype) -> str:
        """What keeps tokens of this dtype from the grouped GEMM, "" where nothing does."""
        if dtype != torch.bfloat16:
            return "PyTorch compiles its grouped GEMM in bf16 alone"
        if self.width % 8 or self.hidden % 8:
            return f"a grouped GEMM needs rows of whole 16 bytes, not {self.width} and {self.hidden} bf16 numbers"
        return ""

    def flops(self) -> float:
        """Per token and expert."""
        return 6.0 * self.width * self.hidden


def grouped(x: Tensor, load: Tensor, gate_up: Tensor, down: Tensor, gated: Gating = swiglu) -> Tensor:
    """Two grouped GEMMs, without telling the host how many tokens each expert has."""
    ends = load.cumsum(0).to(torch.int32)
    gate, up = F.grouped_mm(x, gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
    return F.grouped_mm(gated(gate, up), down.transpose(1, 2), offs=ends)


def loop(x: Tensor, load: Tensor, gate_up: Tensor, down: Tensor, gated: Gating = swiglu) -> Tensor:
    """Expert after expert; any precision, one host sync."""
    outs = []
    for rows, w_in, w_out in zip(x.split(load.tolist()), gate_up, down, strict=True):
        gate, up = F.linear(rows, w_in).chunk(2, -1)
        outs.append(F.linear(gated(gate, up), w_out))
    return torch.cat(outs)
