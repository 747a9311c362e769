"""The phase table: what step n trains on, as a pure function of n."""

from __future__ import annotations

from dataclasses import dataclass

from conf.schema import Refused
from data.course import Leg
from models.mode import Mode
from train.config import MTP_WEIGHT, TrainSection


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
    attention: Mode = "sparse"
    mtp_weight: float = MTP_WEIGHT

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
    """The run, cut at its phase borders and wherever a ramp lets the batch grow.

    Raises Refused where a batch does not hold whole windows.
    """
    starts = [phase.start for phase in train.phases]
    length, planned, samples, tokens, table = train.sequence_length, train.batch_tokens, 0, 0, []
    weights: dict[str, float] | None = None
    attention = train.attention
    mtp_weight = train.first_mtp_weight
    for phase, step, stop in zip([None, *train.phases], [0, *starts], [*starts, train.steps], strict=True):
        if phase is not None:
            length = phase.sequence_length or length
            planned = phase.batch_tokens or planned
            learning_rate = learning_rate if phase.learning_rate is None else phase.learning_rate
            weights = weights if phase.mixture is None else phase.mixture
            attention = phase.attention or attention
            mtp_weight = mtp_weight if phase.mtp_weight is None else phase.mtp_weight
        while step < min(stop, train.steps):
            batch_tokens, until = _held(train, planned, step, tokens)
            if batch_tokens % length:
                if batch_tokens != planned:
                    raise Refused(
                        f"train.ramp makes a batch of {batch_tokens} tokens at step {step}, which is no multiple of "
                        f"sequence_length ({length}); make its batch_tokens and increment multiples of it."
                    )
                raise Refused(
                    f"batch_tokens ({batch_tokens}) is not a multiple of sequence_length ({length}) from step {step} "
                    f"on; take {max(1, round(batch_tokens / length)) * length}."
                )
            rows, last = batch_tokens // length, min(until, stop, train.steps)
            settings = (length, rows, learning_rate, samples, tokens, weights, attention, mtp_weight)
            table.append(Stretch(step, last, *settings))
            step, samples, tokens = last, table[-1].consumed(last), table[-1].tokens_at(last)
    return table


def _held(train: TrainSection, planned: int, step: int, tokens: int) -> tuple[int, int]:
    """The batch at `step`, before which `tokens` were consumed: `planned`, or less within the ramp; and to which step
    it stays."""
    ramp = train.ramp
    if ramp is None:
        return planned, train.steps
    done, over = (step, ramp.steps) if ramp.steps is not None else (tokens, ramp.tokens)
    assert over is not None
    if done >= over:
        return planned, train.steps
    jumps = -(-(train.batch_tokens - ramp.batch_tokens) // ramp.increment)
    made = done * jumps // over
    batch_tokens = min(planned, ramp.batch_tokens + made * ramp.increment)
    left = -(-(made + 1) * over // jumps) - done  # until the next jump, in steps or tokens
    return batch_tokens, step + (left if ramp.steps is not None else -(-left // batch_tokens))
