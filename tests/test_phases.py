"""What step n trains on is a function of n and the phase table alone."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.schema import Refused, build
from train.config import Phase, Ramp, TrainSection
from train.phases import Stretch, stretches


def section(steps: int, phases: list[Phase], ramp: Ramp | None = None) -> TrainSection:
    return TrainSection(steps=steps, sequence_length=8, batch_tokens=32, phases=phases, ramp=ramp)


def at(table: list[Stretch], step: int) -> Stretch:
    return next(stretch for stretch in table if stretch.start <= step < stretch.stop)


LENGTHS = st.sampled_from([4, 8, 16])
PHASES = st.lists(
    st.builds(
        Phase,
        start=st.integers(1, 40),
        sequence_length=st.none() | LENGTHS,
        batch_tokens=st.none() | st.sampled_from([32, 64]),
        learning_rate=st.none() | st.floats(0, 1),
    ),
    max_size=5,
    unique_by=lambda phase: phase.start,
).map(lambda phases: sorted(phases, key=lambda phase: phase.start))

START = st.just(16)  # whole windows of every length, as is each batch that follows
RAMPS = st.one_of(
    st.none(),
    st.builds(Ramp, batch_tokens=START, increment=START, steps=st.integers(1, 30)),
    st.builds(Ramp, batch_tokens=START, increment=START, tokens=st.integers(1, 900)),
)


@given(steps=st.integers(1, 50), phases=PHASES, ramp=RAMPS)
def test_a_table_covers_each_step_once(steps: int, phases: list[Phase], ramp: Ramp | None) -> None:
    table = stretches(section(steps, phases, ramp), 0.5)
    assert [step for stretch in table for step in range(stretch.start, stretch.stop)] == list(range(steps))
    for before, after in pairwise(table):
        assert after.consumed(after.start) == before.consumed(before.stop)
        assert after.tokens_at(after.start) == before.tokens_at(before.stop)
    for stretch in table:
        for step in range(stretch.start, stretch.stop):
            assert stretch.consumed(step + 1) - stretch.consumed(step) == stretch.rows
            assert stretch.tokens_at(step + 1) - stretch.tokens_at(step) == stretch.rows * stretch.sequence_length


@given(steps=st.integers(1, 50), phases=PHASES, ramp=RAMPS)
def test_a_longer_run_or_a_later_phase_changes_nothing_before(
    steps: int, phases: list[Phase], ramp: Ramp | None
) -> None:
    table = stretches(section(steps, phases, ramp), 0.5)
    longer = stretches(section(steps + 10, [*phases, Phase(start=steps + 45, batch_tokens=64)], ramp), 0.5)
    for step in range(steps):
        one, other = at(table, step), at(longer, step)
        assert (one.consumed(step), one.tokens_at(step)) == (other.consumed(step), other.tokens_at(step))
        assert (one.rows, one.sequence_length, one.learning_rate) == (
            other.rows,
            other.sequence_length,
            other.learning_rate,
        )


def test_what_a_phase_leaves_out_stays() -> None:
    table = stretches(
        section(
            10,
            [
                Phase(start=2, sequence_length=16),
                Phase(start=5, batch_tokens=64, learning_rate=0.25),
                Phase(start=7, learning_rate=0.0, mtp_weight=0.1),
                Phase(start=12, sequence_length=4),
            ],
        ),
        0.5,
    )
    assert table == [
        Stretch(start=0, stop=2, sequence_length=8, rows=4, learning_rate=0.5, samples=0, tokens=0),
        Stretch(start=2, stop=5, sequence_length=16, rows=2, learning_rate=0.5, samples=8, tokens=64),
        Stretch(start=5, stop=7, sequence_length=16, rows=4, learning_rate=0.25, samples=14, tokens=160),
        Stretch(
            start=7, stop=10, sequence_length=16, rows=4, learning_rate=0.0, samples=22, tokens=288, mtp_weight=0.1
        ),
    ]


@pytest.mark.parametrize(
    ("ramp", "phases", "batches"),
    [
        pytest.param(Ramp(8, 8, steps=6), [], [8, 8, 16, 16, 24, 24, 32, 32], id="over steps"),
        pytest.param(Ramp(8, 8, steps=5), [], [8, 8, 16, 16, 24, 32, 32, 32], id="over steps that do not divide"),
        pytest.param(Ramp(8, 8, steps=1), [], [8, 32, 32, 32, 32, 32, 32, 32], id="more jumps than steps"),
        pytest.param(Ramp(16, 8, tokens=80), [], [16, 16, 16, 24, 24, 32, 32, 32], id="over tokens"),
        pytest.param(Ramp(8, 20, steps=4), [], None, id="broken windows"),
        pytest.param(Ramp(8, 16, steps=4), [], [8, 8, 24, 24, 32, 32, 32, 32], id="a smaller last jump"),
        pytest.param(Ramp(8, 8, steps=9), [], [8, 8, 8, 16, 16, 16, 24, 24], id="longer than the run"),
        pytest.param(
            Ramp(8, 8, steps=6), [Phase(3, batch_tokens=16)], [8, 8, 16, 16, 16, 16, 16, 16], id="a smaller phase"
        ),
        pytest.param(
            Ramp(8, 8, steps=6), [Phase(3, batch_tokens=64)], [8, 8, 16, 16, 24, 24, 64, 64], id="a larger phase"
        ),
        pytest.param(
            Ramp(16, 16, steps=4),
            [Phase(1, sequence_length=16, learning_rate=1.0)],
            [16, 16, 16, 16, 32, 32, 32, 32],
            id="longer windows",
        ),
    ],
)
def test_a_ramp(ramp: Ramp, phases: list[Phase], batches: list[int] | None) -> None:
    if batches is None:
        with pytest.raises(Refused, match=r"train\.ramp makes a batch of 28 tokens at step 2"):
            stretches(section(8, phases, ramp), 0.5)
        return
    table = stretches(section(8, phases, ramp), 0.5)
    assert [at(table, step).rows * at(table, step).sequence_length for step in range(8)] == batches
    assert [at(table, step).tokens_at(step) for step in range(8)] == [sum(batches[:step]) for step in range(8)]


@pytest.mark.parametrize(
    ("ramp", "sentence"),
    [
        pytest.param({"batch_tokens": 8, "increment": 8}, "either steps or tokens", id="over nothing"),
        pytest.param({"batch_tokens": 8, "increment": 8, "steps": 1, "tokens": 1}, "either", id="over both"),
        pytest.param({"batch_tokens": 32, "increment": 8, "steps": 3}, r"must be below batch_tokens", id="no growth"),
        pytest.param({"batch_tokens": 8, "increment": 0, "steps": 3}, r"increment \(0\)", id="no increment"),
    ],
)
def test_impossible_ramps_are_refused(ramp: dict[str, int], sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        build(TrainSection, {"steps": 10, "sequence_length": 8, "batch_tokens": 32, "ramp": ramp}, "train")


@pytest.mark.parametrize(
    ("phases", "sentence"),
    [
        pytest.param([{"start": 0}], r"start \(0\) must be at least 1", id="at the start of the run"),
        pytest.param([{"start": 5}, {"start": 3}], r"increasing steps, not at \[5, 3\]", id="out of order"),
        pytest.param([{"start": 5}, {"start": 5}], r"increasing steps, not at \[5, 5\]", id="twice at one step"),
        pytest.param([{"start": 5, "sequence_length": 0}], r"phases\[0\]: sequence_length \(0\)", id="no length"),
        pytest.param([{"start": 5, "batch_token": 64}], "did you mean 'batch_tokens'", id="misspelt key"),
        pytest.param(
            [{"start": 5, "learning_rate": -1.0}], r"learning_rate \(-1.0\) must be at least 0", id="negative rate"
        ),
        pytest.param(
            [{"start": 5, "sequence_length": 12}],
            r"batch_tokens \(32\) .* from step 5 on; take 36",
            id="broken windows",
        ),
    ],
)
def test_impossible_phases_are_refused(phases: list[dict[str, Any]], sentence: str) -> None:
    values = {"steps": 10, "sequence_length": 8, "batch_tokens": 32, "phases": phases}
    with pytest.raises(Refused, match=sentence):
        stretches(build(TrainSection, values, "train"), 0.5)
