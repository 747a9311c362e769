"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): modules that predict tokens further ahead.

At each token, module d is handed what the model, or the module before, made of it, and the embedding of the token d
places ahead; by one block and with the model's own head it predicts the token after that one. Training alone runs it:
the model's own logits, and decoding, are what they are without. The schemes of models/mtp/ differ in how a module takes
in what it is handed.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from models.block import Block
from models.config import LayerPlan
from models.contract import Ends, Report, Sequence
from models.parameter import Module
from models.stream import Stream


class Ahead(NamedTuple):
    """What follows each token in hand.

    ids: [D, B, S], at index d the token 1 + d after it, negative where that one lies in another document. targets:
    [D, B, S], at index d the token 2 + d after it, or IGNORE where it is not scored.
    """

    ids: Tensor
    targets: Tensor


class Made(NamedTuple):
    """What a model, or a module, made of each token: its residual stream, and the [B, S, D] that the head reads."""

    residual: Tensor
    hidden: Tensor


class Join(Module):
    """How a module takes in what was made of a token together with a token further ahead."""

    @abstractmethod
    def forward(self, made: Made, embedded: Tensor, ends: Ends) -> Tensor:
        """embedded: [B, S, D], of the token ahead, 0 where there is none. Returns the module's residual stream, which
        `ends` begins."""

    @abstractmethod
    def flops(self, streams: int) -> float:
        """Per token, of a residual stream of so many."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """layer: of each module's block. depth: how many further tokens are predicted. shared: by one module that is
    applied again and again (GLM-5, arXiv 2602.15763), and not by one for each."""

    layer: LayerPlan
    depth: int = 1
    shared: bool = False

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"depth ({self.depth}) must be at least 1; leave mtp null for none")
        if self.layer.reads is not None or self.layer.injection is not None:
            raise ValueError("layer can neither read another layer's state nor inject anything; leave both null")

    @property
    def modules(self) -> int:
        """How many there are."""
        return 1 if self.shared else self.depth

    @abstractmethod
    def join(self, width: int, norm: Callable[[], nn.Module]) -> Join:
        """norm: makes one as wide as the stream."""


class Prediction(nn.Module):
    """One module: a unit of compilation and sharding, with ends and a final norm of its own."""

    def __init__(self, join: Join, block: Block, ends: Ends, norm: nn.Module) -> None:
        super().__init__()
        self.join, self.block, self.ends, self.norm = join, block, ends, norm

    def forward(self, made: Made, embedded: Tensor, sequence: Sequence) -> tuple[Made, Tensor, Report]:
        """embedded: see Join. Returns what it made of each token, its auxiliary losses, and its block's report."""
        stream, report = self.block(Stream.start(self.join(made, embedded, self.ends), {}), sequence)
        return Made(stream.residual, self.norm(self.ends.leave(stream.residual))), stream.extra, report
