"""Matrices in the compute dtype, from parameters kept in the storage dtype; and the dtype that must not be lowered."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from models.parameter import Module, Role


def full_precision(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 where the model already computes in it."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Linear(Module):
    """y = x Wᵀ (+ b), W: [out, in]. The weight is cast to x's dtype, unless declared fp32: then x is raised to it."""

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        inputs: int,
        outputs: int,
        axes: tuple[str, str],
        role: Role = "projection",
        *,
        bias: bool = False,
        fp32: bool = False,
        split: tuple[int, ...] = (),
        sensitive: bool = False,
    ) -> None:
        """axes: logical names of (out, in). split: sizes of independent matrices along the rows. sensitive: see
        models.parameter.Spec."""
        super().__init__()
        self.inputs, self.outputs, self.fp32 = inputs, outputs, fp32
        self.declare("weight", (outputs, inputs), axes, role, fp32=fp32, split=split, sensitive=sensitive)
        if bias:
            self.declare("bias", (outputs,), axes[:1], "bias", fp32=fp32)
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        dtype = full_precision(x.dtype) if self.fp32 else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x.to(dtype), self.weight.to(dtype), bias)

    def flops(self) -> float:
        """Per token."""
        return 2.0 * self.inputs * self.outputs


class GroupedLinear(Module):
    """Block-diagonal y: each group of inputs through its own matrix, [.., groups · in] -> [.., groups · out].

    DeepSeek-V4 report (arXiv 2606.19348), grouped output projection; the groups are independent matrices.
    """

    weight: Tensor

    def __init__(self, groups: int, inputs: int, outputs: int, role: Role = "projection") -> None:
        """inputs, outputs: of one group."""
        super().__init__()
        self.groups, self.inputs, self.outputs = groups, inputs, outputs
        self.declare("weight", (groups, outputs, inputs), ("heads", "latent", "heads_in_group"), role)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (-1, self.inputs))
        return torch.einsum("...gi,goi->...go", x, self.weight.to(x.dtype)).flatten(-2)

    def flops(self) -> float:
        """Per token."""
        return 2.0 * self.groups * self.inputs * self.outputs
