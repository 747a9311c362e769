"""A dense feed-forward and routed experts side by side, each between norms of its own (Gemma 4 26B-A4B; no paper).

    y = norm(dense(norm(x))) + norm(Σ weight · scale[e] · expert_e(norm(x)))

x is the residual as it is. The router reads it through a norm without a gain, a learned scale by number, and 1 / √D.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from conf.schema import at_least
from models.contract import Result, Sequence
from models.feedforward import moe
from models.linear import full_precision
from models.moe.router import Routing
from models.norm import RMSNorm, unit_rms


@dataclass(frozen=True)
class Config(moe.Config):
    """As moe's; shared_hidden is the width of the dense feed-forward."""

    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shared_hidden < 1:
            raise ValueError("shared_hidden must be positive: it is the width of the dense feed-forward")
        at_least(0, self, "norm_eps")

    def build(self, width: int) -> Parallel:
        return Parallel(self, width)


class Parallel(moe.MoE):
    """Both read the residual; both outputs are normalised before they are added."""

    normalises = True
    config: Config
    router_scale: Tensor
    expert_scale: Tensor

    def __init__(self, config: Config, width: int) -> None:
        super().__init__(config, width)
        self.dense_norm, self.dense_post_norm, self.expert_norm, self.expert_post_norm = (
            RMSNorm(width, config.norm_eps) for _ in range(4)
        )
        self.declare("router_scale", (width,), ("width",), "gain", fp32=True)
        self.declare("expert_scale", (config.experts,), ("experts",), "gain", fp32=True)

    def forward(self, x: Tensor, sequence: Sequence, carried: Mapping[str, Any]) -> Result:
        assert self.shared is not None
        mixed = self.mix(self.expert_norm(x), self._route(x), sequence)
        dense = self.dense_post_norm(self.shared.glu(self.dense_norm(x)))
        return replace(mixed, y=dense + self.expert_post_norm(mixed.y))

    def _route(self, x: Tensor) -> Routing:
        flat = x.flatten(0, 1)
        wide = unit_rms(flat.to(full_precision(x.dtype)), self.config.norm_eps)
        routing: Routing = self.router(wide * self.router_scale.to(wide.dtype) * x.shape[-1] ** -0.5)
        scale = self.expert_scale.to(routing.weights.dtype)[routing.experts]
        return routing._replace(weights=routing.weights * scale)
