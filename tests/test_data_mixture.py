"""Several sources in one order: their shares are kept at every sample, and nothing of one comes twice in its epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.schema import Refused, build
from data.config import DataConfig, headline
from data.course import Course, Leg, Standing
from data.interleave import Interleave
from data.loader import Loader
from data.mixture import Mixture
from data.shuffle import Shuffle
from data.source import Facts, Window
from tests.corpora import write_corpus

Weights = list[int]


@dataclass
class Ruler:
    """A source whose tokens are their own places in its stream, through all epochs."""

    fingerprint: str
    num_tokens: int | None = None
    vocab = 1 << 40
    tokenizer = bytes_per_token = None
    unigram_entropy = 0.0

    @property
    def facts(self) -> Facts:
        return {}

    def window(self, index: int, sequence_length: int, lookahead: int, seed: int) -> Window:
        first = index * sequence_length
        return Window(np.arange(first, first + sequence_length + lookahead), np.zeros(1, np.int64))


def shares(weights: Weights) -> list[Fraction]:
    return [Fraction(weight, sum(weights)) for weight in weights]


def weights_of(num_sources: int) -> st.SearchStrategy[Weights]:
    return st.lists(st.integers(0, 40), min_size=num_sources, max_size=num_sources).filter(any)


def furthest(order: Interleave, owed: list[Fraction], num_windows: int) -> Fraction:
    """The most that any source is from its share after any number of windows; `place` and `counts` must agree."""
    counts, most = [0] * len(owed), Fraction(0)
    for n in range(num_windows):
        assert order.counts(n) == counts
        source, rank = order.place(n)
        assert rank == counts[source]
        counts[source] += 1
        most = max(most, *(abs((n + 1) * w + o - c) for w, o, c in zip(order.weights, owed, counts, strict=True)))
    return most


@given(st.integers(1, 9).flatmap(weights_of), st.integers(1, 300))
def test_every_prefix_holds_each_source_by_its_weight(weights: Weights, num_windows: int) -> None:
    active = sum(weight > 0 for weight in weights)
    nothing = [Fraction(0)] * len(weights)
    bound = 1 - Fraction(1, max(1, 2 * active - 2))
    assert furthest(Interleave(shares(weights), nothing, num_windows), nothing, num_windows) <= bound < 1


@pytest.mark.parametrize(
    ("num_sources", "blind"),
    [
        pytest.param(1, 0, id="one source"),
        pytest.param(2, 0.5, id="two sources"),
        pytest.param(3, 1, id="three sources"),
        pytest.param(6, 1.5, id="six sources"),
    ],
)
@given(data=st.data())
def test_shares_are_kept_across_changes_of_weights(num_sources: int, blind: float, data: st.DataObject) -> None:
    """Within δ where what lies ahead is known; else further, among four sources or more."""
    leg = st.tuples(st.sampled_from([1, 1, 2, 3, 7, 40]), weights_of(num_sources).map(shares))
    legs = data.draw(st.lists(leg, min_size=1, max_size=6))
    among = [i for i in range(num_sources) if any(weights[i] for _, weights in legs)]
    known = 1 - Fraction(1, max(1, 2 * len(among) - 2))
    for ahead, bound in ((legs, known), ([], blind)):
        owed = [Fraction(0)] * num_sources
        for at, (num_windows, weights) in enumerate(legs, 1):
            order = Interleave(weights, owed, num_windows, ahead[at:], among if ahead else None)
            assert furthest(order, owed, num_windows) <= bound
            counts = order.counts(num_windows)
            owed = [o + num_windows * w - c for o, w, c in zip(owed, weights, counts, strict=True)]


def test_more_than_a_window_behind_without_a_look_ahead() -> None:
    """The adversary of the docstring: a window each, then nothing more for the source that had it."""
    taken, legs = [], []
    owed = [Fraction(0)] * 4
    for _ in range(3):
        legs.append((1, shares([int(i not in taken) for i in range(4)])))
        order = Interleave(legs[-1][1], owed, 1)
        taken.append(order.place(0)[0])
        owed = [o + w - (i == taken[-1]) for i, (o, w) in enumerate(zip(owed, order.weights, strict=True))]
    assert max(owed) == Fraction(1, 2) + Fraction(1, 3) + Fraction(1, 4)


def test_an_order_without_end_is_kept_as_one_period() -> None:
    order = Interleave(shares([7, 3]), [Fraction(0)] * 2, 10**12)
    assert order.counts(10**12) == [7 * 10**11, 3 * 10**11]
    assert order.place(10**12 + 3)[0] == order.place(3)[0]


@given(weights_of(4), st.lists(weights_of(4), min_size=1, max_size=3), st.integers(0, 60))
def test_a_long_leg_is_kept_as_one_period_and_its_end(first: Weights, later: list[Weights], left: int) -> None:
    ahead = [(3, shares(weights)) for weights in later]
    among = [i for i in range(4) if any(weights[i] for weights in (first, *later))]
    order = Interleave(shares(first), [Fraction(0)] * 4, 10**9, ahead)
    counts = order.counts(10**9 - left)
    owed = [(10**9 - left) * w - c for w, c in zip(order.weights, counts, strict=True)]
    end = Interleave(shares(first), owed, left, ahead, among)
    assert [order.place(10**9 - left + n) for n in range(left)] == [
        (source, counts[source] + rank) for source, rank in map(end.place, range(left))
    ]
    assert len(order._source) < 10_000


@st.composite
def courses(draw: st.DrawFn, most: int = 3, lengths: Sequence[int] = (4, 6, 16)) -> tuple[Mixture, list[Leg]]:
    names = list("abcdef"[: draw(st.integers(1, most))])

    def mixed() -> dict[str, float]:
        return dict(zip(names, map(float, draw(weights_of(len(names)))), strict=True))

    epochs = st.one_of(st.none(), st.integers(max(lengths), 300))
    mixture = Mixture({name: Ruler(name, draw(epochs)) for name in names}, mixed())
    legs = [
        Leg(draw(st.sampled_from(lengths)), draw(st.integers(1, 30)), mixed() if draw(st.booleans()) else None)
        for _ in range(draw(st.integers(1, 5)))
    ]
    return mixture, legs


Sample = tuple[str, int, int]


def samples(mixture: Mixture, legs: list[Leg], standing: Standing | None = None) -> list[Sample]:
    """Of each sample from there on: its source, its first token there, and its length."""
    course = Course(mixture, legs, 0, standing)
    lengths = [leg.sequence_length for leg in legs for _ in range(leg.num_samples)]
    found = []
    for index in range(standing.samples if standing else 0, len(lengths)):
        before, after = course.consumed(index), course.consumed(index + 1)
        (name,) = [name for name in before if after[name] != before[name]]
        found.append((name, int(course.window(index, lengths[index], 1, 0).tokens[0]), lengths[index]))
    return found


def assert_each_goes_on(mixture: Mixture, found: list[Sample]) -> None:
    """No token comes twice, and none is left out but at a new length."""
    for name, source in mixture.sources.items():
        end = 0
        own = [(first, length) for of, first, length in found if of == name]
        for length, stretch in groupby(own, key=itemgetter(1)):
            next_whole = end + -end % length
            end = used([first for first, _ in stretch], next_whole, length, source.num_tokens)


def used(firsts: list[int], begin: int, length: int, epoch: int | None) -> int:
    """Where what was read ends; of an epoch, which is one block here, its last window, though it be read in part.

    Asserts that windows come in a row, or where there are epochs, all of one in any order before those of the next.
    """
    if epoch is None:
        end = begin + len(firsts) * length
        assert firsts == list(range(begin, end, length))
        return end
    while firsts:
        windows = range(begin, (begin // epoch + 1) * epoch, length)
        read, firsts = firsts[: len(windows)], firsts[len(windows) :]
        assert len(set(read)) == len(read)
        assert set(read) <= set(windows)
        begin = windows[-1] + length
    return begin


@given(courses())
def test_a_source_goes_on_where_it_stood(case: tuple[Mixture, list[Leg]]) -> None:
    assert_each_goes_on(case[0], samples(*case))


@given(courses(), st.data())
def test_a_course_goes_on_from_any_place(case: tuple[Mixture, list[Leg]], data: st.DataObject) -> None:
    """Alike where its legs are the same; where those ahead are others, behind what was taken."""
    mixture, legs = case
    whole = samples(mixture, legs)
    at = data.draw(st.integers(0, len(whole)))
    standing = Standing.read(Course(mixture, legs, 0).standing(at).plain())
    assert samples(mixture, legs, standing) == whole[at:]
    past, left = [], at
    for leg in legs:
        past.append(Leg(leg.sequence_length, min(left, leg.num_samples), leg.weights))
        left -= past[-1].num_samples
    now = [*(leg for leg in past if leg.num_samples), *data.draw(st.permutations(legs))]
    assert_each_goes_on(mixture, whole[:at] + samples(mixture, now, standing))


@pytest.mark.parametrize("num_sources", [2, 3, 6])
@given(data=st.data())
def test_each_source_stays_within_a_window_of_its_share(num_sources: int, data: st.DataObject) -> None:
    """Across changes of weights and of length, also where the run is resumed."""
    mixture, legs = data.draw(courses(num_sources))
    among = sum(any(mixture.shares(leg.weights)[i] for leg in legs) for i in range(len(mixture.sources)))
    course, at = Course(mixture, legs, 0), 0
    due = dict.fromkeys(mixture.sources, Fraction(0))
    for leg in legs:
        share = dict(zip(mixture.sources, mixture.shares(leg.weights), strict=True))
        course = course.resumed(course.standing(at)) if data.draw(st.booleans()) else course
        for _ in range(leg.num_samples):
            at += 1
            due = {name: was + share[name] for name, was in due.items()}
            got = course.consumed(at)
            assert max(abs(due[name] - got[name]) for name in due) <= 1 - Fraction(1, max(1, 2 * among - 2)) < 1


@dataclass
class Short(Ruler):
    """One that has no window of more than 8 tokens."""

    def window(self, index: int, sequence_length: int, lookahead: int, seed: int) -> Window:
        if sequence_length > 8:
            raise Refused("it is too short.")
        return super().window(index, sequence_length, lookahead, seed)


@given(st.lists(st.integers(1, 9), min_size=4, max_size=4), st.lists(st.integers(1, 30), min_size=3, max_size=3))
def test_a_source_is_left_out_at_a_length_that_it_has_no_window_of(weights: Weights, sizes: list[int]) -> None:
    """And made up for behind it; no other is further from its share than by two windows meanwhile."""
    names = "abcd"
    kinds = {name: (Short if name in "ab" else Ruler)(name) for name in names}
    mixture = Mixture(kinds, dict(zip(names, map(float, weights), strict=True)))
    long = {name: 0.0 if name in "ab" else 1.0 for name in names}
    legs = [Leg(4, sizes[0]), Leg(16, sizes[1], long), Leg(4, sizes[2] + 20)]
    found = samples(mixture, legs)
    assert {name for name, _, length in found if length == 16} <= set("cd")
    due = dict.fromkeys(names, Fraction(0))
    for index, (_, _, length) in enumerate(found, 1):
        share = dict(zip(names, mixture.shares(long if length == 16 else None), strict=True))
        due = {name: due[name] + share[name] for name in names}
        taken = [name for name, _, _ in found[:index]]
        assert max(abs(due[name] - taken.count(name)) for name in names) < 2
    with pytest.raises(Refused, match=r"data\.train\.a: it is too short"):
        Course(mixture, [*legs, Leg(16, 1)], 0)


@given(courses(), st.data())
def test_what_is_no_change_of_length_or_weights_changes_nothing(
    case: tuple[Mixture, list[Leg]], data: st.DataObject
) -> None:
    """A longer run, another batch size."""
    mixture, legs = case
    whole, last = samples(mixture, legs), legs[-1]
    longer = Leg(last.sequence_length, last.num_samples + 9, last.weights)
    assert samples(mixture, [*legs[:-1], longer])[: len(whole)] == whole
    at = data.draw(st.integers(0, len(legs) - 1))
    cut = data.draw(st.integers(1, legs[at].num_samples))
    halves = [Leg(legs[at].sequence_length, n, legs[at].weights) for n in (cut, legs[at].num_samples - cut) if n]
    assert samples(mixture, [*legs[:at], *halves, *legs[at + 1 :]]) == whole


@given(courses(), st.integers(0, 40), st.sampled_from([2, 4]))
def test_ranks_share_one_order(case: tuple[Mixture, list[Leg]], consumed: int, world_size: int) -> None:
    mixture, legs = case
    legs = [*legs, Leg(8, 48)]
    start = sum(leg.num_samples for leg in legs[:-1])
    course = Course(mixture, legs, 0)

    def loader(rank: int, size: int) -> Loader:
        return Loader(course, sequence_length=8, rank=rank, world_size=size, first=start)

    whole = loader(0, 1).batch(start + consumed, 8)
    parts = [loader(rank, world_size).batch(start + consumed, 8) for rank in range(world_size)]
    assert [row for part in parts for row in part.ids.tolist()] == whole.ids.tolist()
    assert f"{sum(int(part.digest, 16) for part in parts) % 2**64:016x}" == whole.digest


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    for at, name in enumerate(("code", "books", "large")):
        documents = [[*range(at, at + n), 31] for n in (3, 9, 17)]
        write_corpus(folder / name, documents, vocab=64 if name == "large" else 32)
    return folder


def corpus(folder: Path, name: str, **more: Any) -> dict[str, Any]:
    return {"source": "corpus", "path": str(folder / name), **more}


def test_one_source_is_a_mixture_of_itself(corpora: Path) -> None:
    mixture = DataConfig(corpus(corpora, "code")).open_train()
    (source,) = mixture.sources.values()
    assert mixture.fingerprint == source.fingerprint
    course = Course(mixture, [Leg(4, 100)], 3)
    shuffle = Shuffle(source, 4, 0, 3)
    for index in (0, 5, 60):
        expected = source.window(shuffle.window(index), 4, 1, 3)
        assert np.array_equal(course.window(index, 4, 1, 3).tokens, expected.tokens)


def test_a_fingerprint_names_all_that_is_in_it(corpora: Path) -> None:
    def fingerprint(*names: str) -> str:
        return DataConfig({name: corpus(corpora, name, weight=1) for name in names}).open_train().fingerprint

    assert len({fingerprint("code"), fingerprint("books"), fingerprint("code", "books")}) == 3
    assert fingerprint("code", "books") == fingerprint("code", "books")


def test_validation_names_and_their_order(corpora: Path) -> None:
    recall = {"source": "recall", "grid": {"num_pairs": [8, 16], "length": [64, 128]}}
    probes = DataConfig(
        corpus(corpora, "code"),
        {"pairs": recall, "books": corpus(corpora, "books", split="train"), "left out": None},
    ).open_validation()
    assert list(probes) == [
        *(f"pairs/num_pairs={pairs}/length={length}" for pairs in (8, 16) for length in (64, 128)),
        "books",
    ]
    assert headline(probes) == "books"
    probe = probes["pairs/num_pairs=16/length=64"]
    assert probe.length == 64
    facts = {"task": "recall", "pairs": 16, "queries": 8, "null": False, "chance": 1 / 64, "length": 64}
    assert probe.facts(64) == facts
    assert probes["books"].facts(8) == {} and probes["books"].length is None
    assert next(iter(DataConfig(corpus(corpora, "code"), recall).open_validation())) == "recall/num_pairs=8/length=64"


@pytest.mark.parametrize(
    ("train", "sentence"),
    [
        pytest.param(lambda f: {"a": corpus(f, "code")}, r"data\.train\.a\.weight is missing", id="no weight"),
        pytest.param(lambda f: {"a": corpus(f, "code", weight=-1)}, r"weight -1\.0; .* from 0 up", id="negative"),
        pytest.param(lambda f: {"a": corpus(f, "code", weight=math.inf)}, "weight is inf, but a finite", id="infinite"),
        pytest.param(
            lambda f: {"a": corpus(f, "code", weight=math.nan)}, "weight is nan, but a finite", id="not a number"
        ),
        pytest.param(
            lambda f: {"a": corpus(f, "code", weight=0), "b": corpus(f, "books", weight=0)},
            "no weight above 0",
            id="all zero",
        ),
        pytest.param(
            lambda f: {"a": corpus(f, "code", weight=0.12345678), "b": corpus(f, "books", weight=1)},
            r"only after \d+ windows; write them with fewer digits",
            id="endless digits",
        ),
        pytest.param(
            lambda f: {"a": corpus(f, "code", weight=1), "b": corpus(f, "code", weight=1)},
            r"data\.train\.a and b hold the same data",
            id="the same twice",
        ),
        pytest.param(
            lambda f: {"a": corpus(f, "code", weight=1), "b": corpus(f, "large", weight=1)},
            r"data\.train \(b\) was prepared with another tokenizer than data\.train \(a\)",
            id="another tokenizer",
        ),
        pytest.param(lambda f: {"a.b": corpus(f, "code", weight=1)}, "a source 'a.b'; write names", id="name"),
        pytest.param(lambda f: corpus(f, "code", weight=1), r"data\.train\.weight is not a key", id="weight of one"),
        pytest.param(
            lambda f: {**corpus(f, "code"), "b": corpus(f, "books")}, r"data\.train\.b is not a key", id="one and more"
        ),
        pytest.param(lambda f: {"a": None}, r"data\.train\.source is missing", id="nothing left"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(corpora: Path, train: Any, sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        build(DataConfig, {"train": train(corpora)}, "data").open()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        pytest.param({"length": 0}, r"length \(0\) must be at least 1", id="length"),
        pytest.param({"grid": {"num_pairs": []}}, r"grid\.num_pairs is \[\]", id="empty grid"),
        pytest.param({"grid": {"num_pairs": [8, 8]}}, "each once", id="a value twice"),
        pytest.param({"grid": {"num_pair": [8]}}, "did you mean 'num_pairs'", id="misspelt setting"),
        pytest.param({"weight": 1.0}, r"data\.validation\.weight is not a key", id="weight"),
    ],
)
def test_a_validation_that_cannot_be_is_refused(corpora: Path, more: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        build(DataConfig, {"train": corpus(corpora, "code"), "validation": {"source": "recall", **more}}, "data")


def test_validation_on_ids_of_another_tokenizer_is_refused(corpora: Path) -> None:
    config = DataConfig(corpus(corpora, "code"), corpus(corpora, "large", split="train"))
    with pytest.raises(Refused, match=r"data.validation \(corpus\) was prepared with another tokenizer"):
        config.open()


def test_a_source_too_short_for_a_later_length_is_refused_at_once() -> None:
    recall = {"source": "recall", "num_pairs": 8, "num_queries": 8}
    mixture = DataConfig(
        {"few": {**recall, "weight": 9}, "many": {**recall, "num_pairs": 20, "weight": 1}}
    ).open_train()
    Course(mixture, [Leg(64, 8), Leg(32, 8, {"few": 1, "many": 0})], 0)
    with pytest.raises(
        Refused, match=r"data\.train\.many: 20 pairs and 8 queries need a sequence length of 56, but it is 32"
    ):
        Course(mixture, [Leg(64, 8), Leg(32, 1)], 0)


def test_each_corpus_runs_through_its_own_epochs(tmp_path: Path) -> None:
    """Every token is another id: each epoch of each corpus holds each of its tokens once, whatever the weights do."""
    begins, names = {"a": 0, "b": 100}, ["a", "b"]
    for name, begin in begins.items():
        write_corpus(tmp_path / name, [list(range(begin, begin + 24)), list(range(begin + 24, begin + 40))], vocab=140)
    mixture = DataConfig({name: corpus(tmp_path, name, weight=1) for name in names}).open_train()
    weights = [{"a": 1.0, "b": 0.0}, {"a": 0.3, "b": 0.7}, {"a": 0.7, "b": 0.3}, {"a": 0.0, "b": 1.0}]
    legs = [Leg(8, 11, each) for each in (*weights, weights[1])]
    course = Course(mixture, legs, 5)
    stream = [int(token) for index in range(55) for token in course.window(index, 8, 1, 5).tokens[:8]]
    for begin in begins.values():
        own = [token for token in stream if begin <= token < begin + 100]
        assert len(own) > 120
        for epoch in range(len(own) // 40):
            assert sorted(own[40 * epoch : 40 * (epoch + 1)]) == list(range(begin, begin + 40))
