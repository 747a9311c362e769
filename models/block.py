"""One depth: a list of sublayers, each with its own norm, each wrapped by the residual scheme."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from models.contract import Attention, FeedForward, Sequence
from models.norm import RMSNorm
from models.stream import Report, Stream


class AttentionSublayer(nn.Module):
    """Norm, compress, collect (or take what an earlier layer collected), attend."""

    def __init__(self, attention: Attention, width: int, eps: float, layer: int, writer: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width, eps)
        self.attention = attention
        self.layer, self.writer = layer, writer
        self.read_later = False
        self.last_reader = writer != layer

    def forward(self, u: Tensor, stream: Stream, sequence: Sequence) -> tuple[Tensor, Stream, Report]:
        """u: [B, S, D], read off the residual. Returns y, the stream with what it carries changed, and a report."""
        query, state = self.attention.compress(self.norm(u), sequence)
        carried = dict(stream.carried)
        if self.attention.writes:
            pieces = sequence.collect(self.attention.slots(), state)
            if self.read_later:
                carried[self.layer] = pieces
        else:
            pieces = carried[self.writer]
            if self.last_reader:
                del carried[self.writer]
        return self.attention.attend(query, pieces, sequence), replace(stream, carried=carried), {}


class FeedForwardSublayer(nn.Module):
    """Norm and feed-forward; adds the feed-forward's auxiliary loss to the stream."""

    def __init__(self, feedforward: FeedForward, width: int, eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(width, eps)
        self.feedforward = feedforward

    def forward(self, u: Tensor, stream: Stream, sequence: Sequence) -> tuple[Tensor, Stream, Report]:
        """As AttentionSublayer.forward."""
        y, extra, report = self.feedforward(self.norm(u), sequence)
        if extra is not None:
            stream = replace(stream, extra=stream.extra + extra)
        return y, stream, report


class Block(nn.Module):
    """The unit of recompute, compilation and sharding."""

    def __init__(self, residual: Any, attention: AttentionSublayer, feedforward: FeedForwardSublayer) -> None:
        """residual makes one residual scheme for each sublayer."""
        super().__init__()
        self.attention, self.feedforward = attention, feedforward
        self.attention_residual, self.feedforward_residual = residual(), residual()

    def forward(self, stream: Stream, sequence: Sequence) -> tuple[Stream, Report]:
        reports: Report = {}
        for sublayer, residual in (
            (self.attention, self.attention_residual),
            (self.feedforward, self.feedforward_residual),
        ):
            u, carry = residual.read(stream.residual)
            y, stream, report = sublayer(u, stream, sequence)
            stream = replace(stream, residual=residual.write(stream.residual, carry, y))
            reports.update(report)
        return stream, reports
