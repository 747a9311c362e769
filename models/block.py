"""One depth: a list of sublayers, each with its own norms, each wrapped by its residual.

What the stream carries lives as long as somebody reads it: the model tells every sublayer which names a later one still
needs, and the others are dropped.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from models.contract import Attention, FeedForward, Report, Residual, Result, Sequence, State
from models.parameter import Module
from models.stream import Stream


def state_of(layer: int) -> str:
    """The name under which the stream carries what layer `layer` collected."""
    return f"state {layer}"


class Sublayer(nn.Module):
    """residual read → norm → mechanism → norm of its output, if there is one → residual write."""

    needs: tuple[str, ...] = ()
    provides: tuple[str, ...] = ()

    def __init__(self, residual: Residual, norm: nn.Module | None, post_norm: nn.Module | None) -> None:
        super().__init__()
        self.residual, self.norm, self.post_norm = residual, norm, post_norm
        self.live: frozenset[str] = frozenset()

    def keep(self, live: frozenset[str]) -> None:
        """live: the carried names that a later sublayer reads."""
        self.live = live

    @abstractmethod
    def apply_to(self, x: Tensor, carried: Mapping[str, Any], sequence: Sequence) -> Result:
        """x: [B, S, D], as it is read from the residual."""

    def normalised(self, x: Tensor) -> Tensor:
        """What the mechanism is handed."""
        return x if self.norm is None else self.norm(x)

    def forward(self, stream: Stream, sequence: Sequence) -> tuple[Stream, Report]:
        x, carry = self.residual.read(stream.residual)
        result = self.apply_to(x, stream.carried, sequence)
        y = result.y if self.post_norm is None else self.post_norm(result.y)
        residual = self.residual.write(stream.residual, carry, y)
        carried = {name: value for name, value in {**stream.carried, **result.provided}.items() if name in self.live}
        extra = stream.extra if result.extra is None else stream.extra + result.extra
        return Stream(residual, carried, extra), result.report


class Writer(nn.Module):
    """A writer that stands alone: a norm of its own and the state part of a scheme (YOCO, arXiv 2405.05254)."""

    def __init__(self, norm: nn.Module, scheme: Attention) -> None:
        super().__init__()
        self.norm, self.scheme = norm, scheme

    def forward(self, x: Tensor, sequence: Sequence) -> State:
        """x: [B, S, D], as it is read from the residual."""
        return self.scheme.write(self.norm(x), sequence)


class AttentionSublayer(Sublayer):
    """Compress, collect (or take what an earlier layer collected), attend.

    alone: writes the state in the attention's place, from what this sublayer reads of the residual.
    """

    def __init__(
        self,
        attention: Attention,
        layer: int,
        writer: int,
        residual: Residual,
        norm: nn.Module,
        post_norm: nn.Module | None,
        alone: Writer | None = None,
    ) -> None:
        super().__init__(residual, norm, post_norm)
        self.attention, self.layer, self.writer, self.alone = attention, layer, writer, alone
        self.writes = attention.writes or alone is not None
        self.needs = () if self.writes else (state_of(writer),)
        self.provides = (state_of(layer),) if self.writes else ()
        self.shared = False

    def keep(self, live: frozenset[str]) -> None:
        super().keep(live)
        self.shared = self.writes and state_of(self.layer) in live

    def apply_to(self, x: Tensor, carried: Mapping[str, Any], sequence: Sequence) -> Result:
        query, state = self.attention.compress(self.normalised(x), sequence)
        if not self.writes:
            (source,) = self.needs
            return self.attention.attend(query, carried[source], sequence)
        if self.alone is not None:
            state = self.alone(x, sequence)
        pieces = sequence.collect(self.attention.slots(), state)
        result = self.attention.attend(query, pieces, sequence)
        if not self.shared:  # a name that differs from layer to layer would make each layer a graph of its own
            return result
        (name,) = self.provides
        return Result(result.y, result.extra, result.report, {**result.provided, name: pieces})


class FeedForwardSublayer(Sublayer):
    """What a token goes through by itself."""

    def __init__(
        self, feedforward: FeedForward, residual: Residual, norm: nn.Module, post_norm: nn.Module | None
    ) -> None:
        super().__init__(residual, None if feedforward.normalises else norm, post_norm)
        self.feedforward = feedforward
        self.needs, self.provides = feedforward.needs, feedforward.provides

    def apply_to(self, x: Tensor, carried: Mapping[str, Any], sequence: Sequence) -> Result:
        result: Result = self.feedforward(self.normalised(x), sequence, carried)
        return result


class Block(Module):
    """The unit of recompute, compilation and sharding. Its sublayers are its children, by name and in order."""

    scale: Tensor

    def __init__(self, sublayers: Mapping[str, Sublayer], *, scaled: bool) -> None:
        """scaled: the residual is multiplied by one number after the last sublayer (Gemma 4)."""
        super().__init__()
        self.scaled = scaled
        if scaled:
            self.declare("scale", (1,), ("one",), "gain")
        for name, sublayer in sublayers.items():
            self.add_module(name, sublayer)

    def sublayers(self) -> list[Sublayer]:
        """In order."""
        return [module for module in self.children() if isinstance(module, Sublayer)]

    def update_bias(self, load: Tensor) -> None:
        """One step of its router's selection bias, if it has one; load: [E], of the whole global batch."""
        for sublayer in self.sublayers():
            if isinstance(sublayer, FeedForwardSublayer):
                sublayer.feedforward.update_bias(load)

    def forward(self, stream: Stream, sequence: Sequence) -> tuple[Stream, Report]:
        reports: Report = {}
        for sublayer in self.sublayers():
            stream, report = sublayer(stream, sequence)
            reports.update(report)
        if self.scaled:
            stream = Stream(stream.residual * self.scale.to(stream.residual.dtype), stream.carried, stream.extra)
        return stream, reports
