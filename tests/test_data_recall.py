"""Associative recall: the answers stand in the window; in its null they do not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conf.schema import Refused
from data.batch import IGNORE, Batch
from data.loader import Loader
from data.recall import Config


def answered(batch: Batch, num_pairs: int) -> list[bool]:
    """For each scored target, whether it is the value that the pairs at the start give for the key at hand."""
    answers = []
    for ids, targets in zip(batch.ids.tolist(), batch.targets[0].tolist(), strict=True):
        value_of = dict(zip(ids[0 : 2 * num_pairs : 2], ids[1 : 2 * num_pairs : 2], strict=True))
        answers += [value_of[key] == target for key, target in zip(ids, targets, strict=True) if target != IGNORE]
    return answers


@st.composite
def tasks(draw: st.DrawFn) -> tuple[Config, int]:
    num_queries = draw(st.integers(1, 6))
    num_pairs = draw(st.integers(num_queries, 9))
    num_keys = draw(st.integers(num_pairs, 20))
    config = Config(num_pairs, num_queries, num_keys, draw(st.integers(2, 20)), draw(st.sampled_from([0.01, 0.5, 1.0])))
    return config, 2 * (num_pairs + num_queries) + draw(st.integers(0, 21))


@given(tasks(), st.integers(0, 10**6), st.integers(0, 2))
def test_every_answer_stands_in_the_window(task: tuple[Config, int], consumed: int, depth: int) -> None:
    config, sequence_length = task
    source = config.open()
    batch = Loader(source, sequence_length=sequence_length, depth=depth, seed=1).batch(consumed, 3)
    assert answered(batch, config.num_pairs) == [True] * 3 * config.num_queries
    assert batch.count() == 3 * config.num_queries
    assert batch.documents == 1
    assert int(batch.ids.max()) < source.vocab
    for row in range(3):
        scored = batch.targets[0, row] != IGNORE
        assert len(set(batch.ids[row, scored].tolist())) == config.num_queries, "a key is queried once"
        for d in range(1, 1 + depth):  # the same answers, seen from further before
            ahead = batch.targets[d, row][: sequence_length - d]
            assert torch.equal(ahead, batch.targets[0, row][d:])


def test_answers_of_the_null_are_at_chance() -> None:
    config = Config(num_values=8, null_task=True)
    batch = Loader(config.open(), sequence_length=64, seed=0).batch(0, 1000)
    found = answered(batch, config.num_pairs)
    deviation = (len(found) * (1 / 8) * (7 / 8)) ** 0.5
    assert abs(sum(found) - len(found) / 8) < 4 * deviation
    # Nor is a value likelier than another.
    values = batch.targets[0][batch.targets[0] != IGNORE].bincount()[1 + config.num_keys :]
    assert values.sub(len(found) / 8).abs().max() < 4.5 * deviation


def test_windows_are_drawn_anew_by_index_seed_and_split() -> None:
    def window(config: Config, seed: int, index: int) -> tuple[int, ...]:
        return tuple(Loader(config.open(), sequence_length=64, seed=seed).batch(index, 1).ids.flatten().tolist())

    drawn = [
        window(config, seed, index)
        for config in (Config(), Config(split="valid"), Config(null_task=True))
        for seed in (0, 1)
        for index in range(20)
    ]
    assert len(set(drawn)) == len(drawn)
    assert window(Config(), 1, 3) == window(Config(), 1, 3)


def test_queries_gather_near_the_pairs_by_the_power() -> None:
    """Mean slot of one query: spread evenly it is the middle; with p ∝ 1/i it is num_slots / H(num_slots)."""

    def mean_slot(power: float) -> float:
        config = Config(num_pairs=1, num_queries=1, power=power)
        batch = Loader(config.open(), sequence_length=2 + 2 * 24).batch(0, 4000)
        return float((batch.targets[0] != IGNORE).nonzero()[:, 1].sub(2).double().mean()) / 2 + 1

    assert abs(mean_slot(1.0) - 12.5) < 0.5
    assert abs(mean_slot(1e-9) - 24 / sum(1 / i for i in range(1, 25))) < 0.5


def test_validation_needs_a_number_of_samples() -> None:
    loader = Loader(Config().open(), sequence_length=64)
    assert sum(b.count() for b in loader.fixed(6, 4)) == 6 * 8
    with pytest.raises(Refused, match="endless"):
        next(loader.fixed(None, 4))


def test_a_window_too_short_is_refused_at_once() -> None:
    with pytest.raises(Refused, match="need a sequence length of 32, but it is 31"):
        Loader(Config().open(), sequence_length=31)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        pytest.param({"num_queries": 9}, "num_queries ≤ num_pairs", id="more-queries-than-pairs"),
        pytest.param({"num_keys": 7}, "num_pairs ≤ num_keys", id="more-pairs-than-keys"),
        pytest.param({"num_queries": 0}, "1 ≤ num_queries", id="no-query"),
        pytest.param({"num_values": 1}, "at least 2", id="one-value"),
        pytest.param({"power": 0.0}, "above 0", id="no-power"),
    ],
)
def test_impossible_tasks_are_told(settings: dict[str, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Config(**settings)  # type: ignore[arg-type]
