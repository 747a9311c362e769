"""Rotary position embedding (RoFormer, arXiv 2104.09864), stretched by YaRN (arXiv 2309.00071), or of the fast pairs
alone (p-RoPE, arXiv 2410.06205)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from models.linear import full_precision


@dataclass(frozen=True)
class Yarn:
    """YaRN, section 3.2: slow frequencies are divided by `factor`, fast ones kept, with a linear ramp between.

    original_length: positions of the first training. magnitude: factor on cos and sin (1 where the model corrects the
    softmax scale instead, as DeepSeek's do). truncate: round the ramp's ends to whole frequency pairs.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    magnitude: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.factor < 1 or self.original_length < 1:
            raise ValueError("YaRN needs a factor of at least 1 and a positive original_length")
        if not 0 < self.beta_slow <= self.beta_fast:
            raise ValueError(
                f"YaRN needs a beta_slow ({self.beta_slow}) above 0 and a beta_fast ({self.beta_fast}) not below it"
            )


@dataclass(frozen=True)
class Rope:
    """How a slice of even size is rotated.

    pairing: which numbers form a pair, (2i, 2i+1) or (i, i + size/2). proportion: share of the pairs that turn, the
    fastest, at the frequencies that they have where all turn; the others carry no position.
    """

    base: float = 10_000.0
    pairing: Literal["interleaved", "half"] = "half"
    yarn: Yarn | None = None
    proportion: float = 1.0

    def __post_init__(self) -> None:
        if self.base <= 1:
            raise ValueError(f"base ({self.base}) must be above 1, so that each pair turns slower than the one before")
        if not 0 <= self.proportion <= 1:
            raise ValueError(f"proportion ({self.proportion}) must lie between 0 and 1, a share of the pairs")

    def frequencies(self, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[size / 2], radians per position."""
        exponent = torch.arange(0, size, 2, dtype=dtype, device=device) / size
        pair = torch.arange(size // 2, dtype=dtype, device=device)
        frequency = (pair < int(self.proportion * size // 2)) / self.base**exponent
        if self.yarn is None:
            return frequency
        low, high = self._ramp_ends(size, self.yarn)
        slow = ((pair - low) / (high - low or 0.001)).clamp(0, 1)
        return frequency / self.yarn.factor * slow + frequency * (1 - slow)

    def _ramp_ends(self, size: int, yarn: Yarn) -> tuple[float, float]:
        def pair_of(turns: float) -> float:
            return size * math.log(yarn.original_length / (turns * 2 * math.pi)) / (2 * math.log(self.base))

        low, high = pair_of(yarn.beta_fast), pair_of(yarn.beta_slow)
        if yarn.truncate:
            low, high = math.floor(low), math.ceil(high)
        return max(low, 0), min(high, size - 1)

    def rotate(self, x: Tensor, position: Tensor, *, inverse: bool = False) -> Tensor:
        """Rotate all of x's last dim. x: [B, S, ..., size], position: [B, S]. Angles are computed in fp32 or more."""
        dtype, size = full_precision(x.dtype), x.shape[-1]
        angle = position.to(dtype)[..., None] * self.frequencies(size, x.device, dtype)
        angle = angle.reshape(*position.shape, *[1] * (x.dim() - 3), size // 2)
        magnitude = 1.0 if self.yarn is None else self.yarn.magnitude
        cos, sin = angle.cos() * magnitude, angle.sin() * (-magnitude if inverse else magnitude)
        wide = x.to(dtype)
        if self.pairing == "half":
            a, b = wide.chunk(2, -1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)
        a, b = wide.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(x.dtype)


def rotate_first(rope: Rope, x: Tensor, size: int, position: Tensor) -> Tensor:
    """Rotate the first `size` numbers of x's last dim, leave the others."""
    if size == 0:
        return x
    if size == x.shape[-1]:
        return rope.rotate(x, position)
    turned, kept = x.split((size, x.shape[-1] - size), -1)
    return torch.cat((rope.rotate(turned, position), kept), -1)


def rotate_last(rope: Rope, x: Tensor, size: int, position: Tensor, *, inverse: bool = False) -> Tensor:
    """Rotate the last `size` numbers of x's last dim, leave the others."""
    if size == x.shape[-1]:
        return rope.rotate(x, position, inverse=inverse)
    kept, turned = x.split((x.shape[-1] - size, size), -1)
    return torch.cat((kept, rope.rotate(turned, position, inverse=inverse)), -1)
