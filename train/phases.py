"""The phase table: what step n trains on, as a pure function of n."""

from __future__ import annotations

from dataclasses import dataclass

from conf.schema import Refused
from data.course import Leg
from train.config import TrainSection


@dataclass(frozen=True)
class Stretch:
    """Steps start..stop share these settings. rows: windows of one step over all ranks.

    samples, tokens: consumed before `start`. weights: of the sources, None for those of data.train.
    """

    start: int
    stop: int
    sequence_length: int
    rows: int
    learning_rate: float
    samples: int
    tokens: int
    weights: dict[str, float] | None = None

    def consumed(self, step: int) -> int:
        """Samples consumed before `step`."""
        return self.samples + (step - self.start) * self.rows

    def tokens_at(self, step: int) -> int:
        """Tokens consumed before `step`."""
        return self.tokens + (step - self.start) * self.rows * self.sequence_length

    def leg(self) -> Leg:
        """What the data needs to know of it."""
        return Leg(self.sequence_length, self.consumed(self.stop) - self.samples, self.weights)


def stretches(train: TrainSection, learning_rate: float) -> list[Stretch]:
    """The run, cut at its phase borders. Raises Refused where a batch does not hold whole windows."""
    starts = [phase.start for phase in train.phases if phase.start < train.steps]
    stops = [*starts, train.steps]
    length, batch_tokens, samples, tokens, table = train.sequence_length, train.batch_tokens, 0, 0, []
    weights: dict[str, float] | None = None
    for index, (start, stop) in enumerate(zip([0, *starts], stops, strict=True)):
        if index:
            phase = train.phases[index - 1]
            length = phase.sequence_length or length
            batch_tokens = phase.batch_tokens or batch_tokens
            learning_rate = learning_rate if phase.learning_rate is None else phase.learning_rate
            weights = weights if phase.mixture is None else phase.mixture
        if batch_tokens % length:
            raise Refused(
                f"batch_tokens ({batch_tokens}) is not a multiple of sequence_length ({length}) from step {start} on; "
                f"take {max(1, round(batch_tokens / length)) * length}."
            )
        rows = batch_tokens // length
        table.append(Stretch(start, stop, length, rows, learning_rate, samples, tokens, weights))
        samples, tokens = table[-1].consumed(stop), table[-1].tokens_at(stop)
    return table
