"""Vectors as they are stored in fp8: E4M3 numbers with one scale each (DeepSeek-V3, arXiv 2412.19437, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from models.linear import full_precision

LARGEST = 448.0
"""Of E4M3."""


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: [..., d] to numbers [..., d] that E4M3 holds, in x's dtype, and the scale [..., 1] in fp32 that they are to be
    multiplied with. The gradient passes the rounding by."""
    wide = x.to(full_precision(x.dtype))
    scale = (wide.detach().abs().amax(-1, keepdim=True) / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    scale = scale.float().to(scale.dtype)
    small = wide / scale
    held = small.detach().clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).to(wide.dtype)
    return (small + (held - small).detach()).to(x.dtype), scale
