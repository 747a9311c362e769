"""The phase table: what step n trains on, as a pure function of n."""

from __future__ import annotations

from dataclasses import dataclass

from conf.schema import Refused
from train.config import TrainSection


@dataclass(frozen=True)
class Stretch:
    """Steps start..stop share these settings. first_sample: of the source's windows of this length, at step `start`.

    tokens: consumed before `start`. rows: windows of one step over all ranks.
    """

    start: int
    stop: int
    sequence_length: int
    rows: int
    learning_rate: float
    first_sample: int
    tokens: int

    def consumed(self, step: int) -> int:
        """Samples consumed before `step`."""
        return self.first_sample + (step - self.start) * self.rows

    def tokens_at(self, step: int) -> int:
        """Tokens consumed before `step`."""
        return self.tokens + (step - self.start) * self.rows * self.sequence_length


def stretches(train: TrainSection, learning_rate: float) -> list[Stretch]:
    """The run, cut at its phase borders. Raises Refused where a batch does not hold whole windows."""
    starts = [phase.start for phase in train.phases if phase.start < train.steps]
    stops = [*starts, train.steps]
    length, batch_tokens, tokens, table = train.sequence_length, train.batch_tokens, 0, []
    for index, (start, stop) in enumerate(zip([0, *starts], stops, strict=True)):
        if index:
            phase = train.phases[index - 1]
            length = phase.sequence_length or length
            batch_tokens = phase.batch_tokens or batch_tokens
            learning_rate = learning_rate if phase.learning_rate is None else phase.learning_rate
        if batch_tokens % length:
            raise Refused(
                f"batch_tokens ({batch_tokens}) is not a multiple of sequence_length ({length}) from step {start} on; "
                f"take {max(1, round(batch_tokens / length)) * length}."
            )
        # a window of the new length starts at the next whole window: nothing is repeated across the border
        rows, first = batch_tokens // length, -(-tokens // length)
        table.append(Stretch(start, stop, length, rows, learning_rate, first, tokens))
        tokens = table[-1].tokens_at(stop)
    return table
