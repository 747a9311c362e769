"""Windows are shuffled a block at a time: each is read once, and what was read is known at any place."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.schema import Refused
from data.config import DataConfig
from data.course import Course, Leg, Standing
from data.shuffle import Shuffle
from tests.corpora import write_corpus
from tests.test_data_mixture import Ruler


@dataclass(frozen=True)
class Case:
    """Windows of `length` tokens from `origin` on of a source with epochs of `tokens`, in blocks of `block` windows."""

    tokens: int
    length: int
    origin: int
    block: int
    seed: int = 0

    def shuffle(self) -> Shuffle:
        return Shuffle(Ruler("a", self.tokens), self.length, self.origin, self.seed, self.block)

    def epoch(self, window: int) -> int:
        return window * self.length // self.tokens


cases = st.integers(1, 400).flatmap(
    lambda tokens: st.builds(
        Case, st.just(tokens), st.integers(1, tokens), st.integers(0, 900), st.integers(1, 70), st.integers(0, 3)
    )
)


@given(cases, st.integers(0, 300))
def test_each_window_is_read_once_a_block_after_the_other(case: Case, taken: int) -> None:
    """None behind `used` is, all before it are but for the rest of a block, and none is far from its place."""
    shuffle = case.shuffle()
    read = [shuffle.window(n) for n in range(taken)]
    assert len(set(read)) == taken
    end, rest = divmod(shuffle.used(taken), case.length)
    assert rest == 0
    assert case.origin + taken <= end < case.origin + taken + case.block
    assert set(read) <= set(range(case.origin, end))
    assert {shuffle.window(n) for n in range(end - case.origin)} == set(range(case.origin, end))
    assert all(case.epoch(a) <= case.epoch(b) for a, b in pairwise(read))


def test_the_order_changes_with_seed_epoch_length_origin_and_source() -> None:
    def order(name: str = "a", seed: int = 0, length: int = 4, origin: int = 0) -> tuple[int, ...]:
        shuffle = Shuffle(Ruler(name, 4000), length, origin, seed)
        return tuple(shuffle.window(n) - origin for n in range(900))

    orders = [order(), order("b"), order(seed=1), order(length=2), order(origin=1000), order(origin=7)]
    assert len(set(orders)) == len(orders)
    assert order() == order()


def test_a_batch_is_of_many_documents_though_each_is_many_windows(tmp_path: Path) -> None:
    """Of 40 documents of 50 windows, 16 windows drawn at random would on average come from 13.3."""
    documents = [[document] * 200 for document in range(40)]
    mixture = DataConfig({"source": "corpus", "path": str(write_corpus(tmp_path, documents, vocab=40))}).open_train()
    course = Course(mixture, [Leg(4, 2000)], 0)
    found = [int(course.window(index, 4, 1, 0).tokens[0]) for index in range(2000)]
    assert np.mean([len(set(found[at : at + 16])) for at in range(0, 2000, 16)]) == pytest.approx(13.3, abs=0.4)
    assert all(found.count(document) == 50 for document in range(40))


@pytest.mark.parametrize(
    "plain",
    [
        pytest.param({"samples": 8, "windows": [8], "at": [64], "owed": ["0"]}, id="where it stood then"),
        pytest.param(None, id="nothing"),
    ],
)
def test_a_checkpoint_that_an_older_version_read_in_another_order_is_refused(plain: dict[str, Any] | None) -> None:
    with pytest.raises(Refused, match=r"an older version, .* train\.init"):
        Standing.read(plain)
