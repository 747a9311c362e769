"""Learning-rate schedules: their shape, and that bad numbers are refused."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from conf.schema import Refused, build
from train.schedule import Schedule

COSINE = Schedule(warmup_steps=10, decay_fraction=1.0, curve="cosine", final=0.1)
WSD = Schedule(warmup_steps=10, decay_fraction=0.2, curve="linear", final=0.0)


@pytest.mark.parametrize(
    ("schedule", "step", "rate"),
    [
        pytest.param(COSINE, 0, 0.1, id="the first update is not wasted on rate zero"),
        pytest.param(COSINE, 9, 1.0, id="warm-up ends at one"),
        pytest.param(COSINE, 10, 1.0, id="cosine starts at one"),
        pytest.param(COSINE, 55, 0.55, id="cosine is half way at half time"),
        pytest.param(COSINE, 100, 0.1, id="cosine ends at final"),
        pytest.param(COSINE, 1000, 0.1, id="and stays there"),
        pytest.param(WSD, 79, 1.0, id="the plateau"),
        pytest.param(WSD, 80, 1.0, id="decay starts at one"),
        pytest.param(WSD, 90, 0.5, id="linear is half way at half time"),
        pytest.param(WSD, 99, 0.05, id="the last update is not wasted on rate zero"),
        pytest.param(Schedule(0, 0.4, "sqrt", 0.0), 70, 0.5, id="sqrt is half way at a quarter"),
        pytest.param(Schedule(0, 0.0, "linear", 0.0), 99, 1.0, id="no warm-up, no decay"),
        pytest.param(Schedule(200, 1.0, "cosine", 0.1), 99, 0.5, id="warm-up longer than the run"),
    ],
)
def test_rate(schedule: Schedule, step: int, rate: float) -> None:
    assert schedule.rate(step, 100) == pytest.approx(rate, abs=1e-12)


@given(
    st.integers(0, 50),
    st.floats(0, 1),
    st.sampled_from(["linear", "cosine", "sqrt"]),
    st.floats(0, 1),
    st.integers(1, 200),
)
def test_rises_then_never_rises_again(warmup: int, fraction: float, curve: str, final: float, total: int) -> None:
    schedule = Schedule(warmup, fraction, curve, final)  # type: ignore[arg-type]
    rates = [schedule.rate(step, total) for step in range(total + 2)]
    assert all(math.isfinite(rate) and 0.0 <= rate <= 1.0 for rate in rates)
    assert all(rate > 0.0 for rate in rates[:total])
    assert all(a < b for a, b in pairwise(rates[:warmup]))
    assert all(a >= b - 1e-12 for a, b in pairwise(rates[warmup:]))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        pytest.param({"warmup_steps": -1}, "warmup_steps", id="negative warm-up"),
        pytest.param({"decay_fraction": 1.5}, "decay_fraction", id="decay longer than the run"),
        pytest.param({"final": -0.1}, "final", id="negative rate"),
        pytest.param({"final": float("nan")}, "final", id="not a number"),
        pytest.param({"curve": "cosin"}, "cosine", id="misspelt curve"),
    ],
)
def test_bad_numbers_are_refused(values: dict[str, object], named: str) -> None:
    with pytest.raises(Refused, match=named):
        build(Schedule, values, "schedule")


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "conf/schedule").glob("*.yaml")), ids=lambda path: path.stem
)
def test_shipped_schedules_build(path: Path) -> None:
    build(Schedule, yaml.safe_load(path.read_text()), "schedule")
