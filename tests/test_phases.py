"""What step n trains on is a function of n and the phase table alone."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.schema import Refused, build
from train.config import Phase, TrainSection
from train.phases import Stretch, stretches


def section(steps: int, phases: list[Phase]) -> TrainSection:
    return TrainSection(steps=steps, sequence_length=8, batch_tokens=32, phases=phases)


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


@given(steps=st.integers(1, 50), phases=PHASES)
def test_a_table_covers_each_step_once(steps: int, phases: list[Phase]) -> None:
    table = stretches(section(steps, phases), 0.5)
    assert [step for stretch in table for step in range(stretch.start, stretch.stop)] == list(range(steps))
    for before, after in pairwise(table):
        assert after.consumed(after.start) == before.consumed(before.stop)
        assert after.tokens_at(after.start) == before.tokens_at(before.stop)
    for stretch in table:
        for step in range(stretch.start, stretch.stop):
            assert stretch.consumed(step + 1) - stretch.consumed(step) == stretch.rows
            assert stretch.tokens_at(step + 1) - stretch.tokens_at(step) == stretch.rows * stretch.sequence_length


@given(steps=st.integers(1, 50), phases=PHASES)
def test_a_longer_run_or_a_later_phase_changes_nothing_before(steps: int, phases: list[Phase]) -> None:
    table = stretches(section(steps, phases), 0.5)
    longer = stretches(section(steps + 10, [*phases, Phase(start=steps + 45, batch_tokens=64)]), 0.5)
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
                Phase(start=7, learning_rate=0.0),
                Phase(start=12, sequence_length=4),
            ],
        ),
        0.5,
    )
    assert table == [
        Stretch(start=0, stop=2, sequence_length=8, rows=4, learning_rate=0.5, samples=0, tokens=0),
        Stretch(start=2, stop=5, sequence_length=16, rows=2, learning_rate=0.5, samples=8, tokens=64),
        Stretch(start=5, stop=7, sequence_length=16, rows=4, learning_rate=0.25, samples=14, tokens=160),
        Stretch(start=7, stop=10, sequence_length=16, rows=4, learning_rate=0.0, samples=22, tokens=288),
    ]


@pytest.mark.parametrize(
    ("phases", "sentence"),
    [
        pytest.param([{"start": 0}], r"start \(0\) must be at least 1", id="at the start of the run"),
        pytest.param([{"start": 5}, {"start": 3}], r"increasing steps, not at \[5, 3\]", id="out of order"),
        pytest.param([{"start": 5}, {"start": 5}], r"increasing steps, not at \[5, 5\]", id="twice at one step"),
        pytest.param([{"start": 5, "sequence_length": 0}], r"phases\[0\]: sequence_length \(0\)", id="no length"),
        pytest.param([{"start": 5, "batch_token": 64}], "did you mean 'batch_tokens'", id="misspelt key"),
        pytest.param([{"start": 5, "learning_rate": -1.0}], "must not be negative", id="negative rate"),
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
