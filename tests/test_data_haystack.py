"""Needles and variables in a haystack: a reader who follows the rules knows every answer, and in the null none does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.schema import Refused, build
from data import needle, tracking
from data.config import DataConfig
from data.loader import Loader
from data.source import Window
from tests.corpora import write_corpus

Answers = list[tuple[list[int], list[int]]]  # what the reader says, and what stands there


def read_needles(window: Window, config: needle.Config, hay: int) -> Answers:
    """A key is followed by its value; when it comes again, that is the question."""
    tokens, m = window.tokens.tolist(), config.value_tokens
    keys = range(hay, hay + config.num_keys)
    known: dict[int, list[int]] = {}
    found: Answers = []
    for at, token in enumerate(tokens):
        if token in keys:
            value = tokens[at + 1 : at + 1 + m]
            if token in known:
                found.append((known[token], value))
            known.setdefault(token, value)
    return found


def read_variables(window: Window, config: tracking.Config, hay: int) -> Answers:
    """Whoever assigns holds what it was given; the second assignment to a name is the question."""
    tokens = window.tokens.tolist()
    first_value = hay + 1 + config.num_names
    held: dict[int, int] = {}
    found: Answers = []
    for at, token in enumerate(tokens):
        if token == hay:
            name, given = tokens[at - 1], tokens[at + 1]
            if name in held:
                while name < first_value:
                    name = held[name]
                found.append(([name], [given]))
            else:
                held[name] = given
    return found


def scored(window: Window) -> list[int]:
    assert window.scored is not None
    return window.tokens[window.scored].tolist()


needles = st.builds(
    lambda queries, more, keys, **settings: needle.Config(
        num_queries=queries, num_needles=queries + more, num_keys=queries + more + keys, **settings
    ),
    queries=st.integers(1, 4),
    more=st.integers(0, 4),
    keys=st.integers(0, 9),
    num_values=st.integers(2, 20),
    value_tokens=st.integers(1, 3),
    haystack=st.integers(1, 9),
)
chains = st.builds(
    lambda queries, more, hops, names, **settings: tracking.Config(
        num_queries=queries,
        num_chains=queries + more,
        num_hops=hops,
        num_names=(queries + more) * (hops + 1) + names,
        **settings,
    ),
    queries=st.integers(1, 3),
    more=st.integers(0, 3),
    hops=st.integers(0, 4),
    names=st.integers(0, 9),
    num_values=st.integers(2, 20),
    haystack=st.integers(1, 9),
)


@given(needles, st.integers(0, 40), st.integers(1, 3), st.integers(0, 10**6))
def test_every_value_asked_for_stands_in_the_window(
    config: needle.Config, hay: int, lookahead: int, index: int
) -> None:
    size = 1 + config.value_tokens
    length = hay + (config.num_needles + config.num_queries) * size - 1
    source = config.open()
    window = source.window(index, length, lookahead, 1)
    found = read_needles(window, config, source.haystack.vocab)
    assert [answer for answer, _ in found] == [value for _, value in found]
    assert len(found) == config.num_queries
    assert scored(window) == [token for _, value in found for token in value], "all answers and nothing else"
    assert len(window.tokens) == length + lookahead and window.tokens.max() < source.vocab
    assert window.scored is not None and np.flatnonzero(window.scored).max() == length, (
        "the last answer is the target of the last input"
    )
    first_key = source.haystack.vocab
    keys = window.tokens[(window.tokens >= first_key) & (window.tokens < first_key + config.num_keys)]
    assert len(set(keys.tolist())) == config.num_needles, "each key is of one needle"
    assert sum(window.tokens[: length + 1] < first_key) == hay


@given(chains, st.integers(0, 40), st.integers(1, 3), st.integers(0, 10**6))
def test_every_variable_asked_for_can_be_followed(
    config: tracking.Config, hay: int, lookahead: int, index: int
) -> None:
    num_statements = config.num_chains * (config.num_hops + 1)
    length = hay + 3 * (num_statements + config.num_queries) - 1
    source = config.open()
    window = source.window(index, length, lookahead, 1)
    found = read_variables(window, config, source.haystack.vocab)
    assert [answer for answer, _ in found] == [value for _, value in found]
    assert len(found) == config.num_queries
    assert scored(window) == [token for _, value in found for token in value]
    assert len(window.tokens) == length + lookahead and window.tokens.max() < source.vocab
    tokens = window.tokens[: length + 1].tolist()
    names = [tokens[at - 1] for at, token in enumerate(tokens) if token == config.haystack]
    assert len(set(names)) == num_statements, "each variable is assigned once"
    assert len(names) == num_statements + config.num_queries
    # every assignment names a variable that was assigned before, one hop further from the value
    hops: dict[int, int] = {}
    first_value = source.haystack.vocab + 1 + config.num_names
    for at, token in enumerate(tokens):
        if token == config.haystack and tokens[at - 1] not in hops:
            given = tokens[at + 1]
            hops[tokens[at - 1]] = 0 if given >= first_value else hops[given] + 1
    assert all(hops[name] == config.num_hops for name in names[num_statements:])


TASKS = [
    pytest.param(needle.Config(num_needles=4, num_queries=2, num_values=8), read_needles, id="needles"),
    pytest.param(needle.Config(num_needles=3, num_values=8, depth=0.5), read_needles, id="a needle at a depth"),
    pytest.param(needle.Config(num_values=8, value_tokens=3), read_needles, id="a value of three tokens"),
    pytest.param(
        tracking.Config(num_chains=3, num_hops=2, num_queries=2, num_values=8), read_variables, id="variables"
    ),
]


@pytest.mark.parametrize(("config", "read"), TASKS)
def test_in_the_null_a_reader_is_at_chance(config: Any, read: Callable[..., Answers]) -> None:
    null = type(config)(**{**config.__dict__, "null_task": True})
    source, plain = null.open(), config.open()
    right = [
        said == stands
        for index in range(1500)
        for answer, value in read(source.window(index, 40, 1, 0), null, null.haystack)
        for said, stands in zip(answer, value, strict=True)
    ]
    deviation = (len(right) * (1 / 8) * (7 / 8)) ** 0.5
    assert abs(sum(right) - len(right) / 8) < 4 * deviation
    assert source.facts["chance"] == 1 / 8
    assert {**source.facts, "null": False} == plain.facts
    # nor is a value likelier than another
    values = np.bincount([token for index in range(1500) for token in scored(source.window(index, 40, 1, 0))])
    counts = values[-8:]
    assert counts.sum() == len(right) and abs(counts - len(right) / 8).max() < 4.5 * deviation


@pytest.mark.parametrize(("config", "read"), TASKS)
def test_windows_are_drawn_anew_by_index_seed_split_and_length(config: Any, read: object) -> None:
    def drawn(**changed: Any) -> list[tuple[int, ...]]:
        source = type(config)(**{**config.__dict__, **changed}).open()
        return [
            tuple(source.window(index, length, 1, seed).tokens)
            for seed in (0, 1)
            for length in (40, 41)
            for index in range(10)
        ]

    every = [*drawn(), *drawn(split="valid"), *drawn(null_task=True)]
    assert len({window[:30] for window in every}) == len(every)
    assert drawn() == drawn()


@given(st.integers(1, 6), st.integers(0, 60), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_a_needle_lies_at_its_depth(num_needles: int, hay: int, depth: float) -> None:
    config = needle.Config(num_needles=num_needles, depth=depth, haystack=5)
    window = config.open().window(3, hay + 2 * (num_needles + 1) - 1, 1, 0)
    tokens = window.tokens.tolist()
    asked = tokens[-2]
    place = tokens.index(asked)
    assert sum(token < 5 for token in tokens[:place]) == round(depth * hay)
    others = [token for token in tokens[:place] if 5 <= token < 5 + config.num_keys]
    assert len(others) == round(depth * (num_needles - 1))


def test_without_a_depth_needles_lie_everywhere() -> None:
    source = needle.Config(haystack=5).open()
    places = [int(np.flatnonzero(source.window(index, 23, 1, 0).tokens >= 5)[0]) for index in range(2000)]
    counts = np.bincount(places, minlength=21)
    assert len(counts) == 21
    assert abs(counts - 2000 / 21).max() < 5 * (2000 / 21) ** 0.5


def text(folder: Path) -> dict[str, Any]:
    return {"source": "corpus", "path": str(write_corpus(folder / "text", [list(range(20)), list(range(9))], vocab=20))}


@pytest.mark.parametrize(
    ("task", "statements"),
    [
        pytest.param({"source": "needle", "num_needles": 2}, 2 * 2 + 2, id="needle"),
        pytest.param({"source": "tracking", "num_chains": 1, "num_hops": 1}, 3 * 2 + 3, id="tracking"),
    ],
)
def test_a_haystack_of_text_is_the_text_in_its_order(task: Mapping[str, Any], statements: int, tmp_path: Path) -> None:
    own = text(tmp_path)
    mixture, probes = DataConfig({**own}, {**task, "haystack": own, "grid": {"length": [30]}}).open()
    (corpus,), (probe,) = mixture.sources.values(), probes.values()
    tokens = probe.source.window(4, 30, 1, 7).tokens
    assert np.array_equal(tokens[tokens < 20], corpus.window(4, 31 - statements, 0, 7).tokens)
    assert probe.source.tokenizer == corpus.tokenizer
    moved = {**own, "path": str(tmp_path / "moved")}
    (tmp_path / "text").rename(tmp_path / "moved")
    again = DataConfig({**task, "haystack": moved}).open_train()
    assert again.fingerprint == probe.source.fingerprint, "wherever it lies"


def test_only_answers_are_targets_in_a_batch() -> None:
    config = needle.Config(num_needles=3, num_queries=2, value_tokens=2)
    batch = Loader(config.open(), sequence_length=32, depth=1).batch(0, 5)
    assert batch.count() == 5 * 2 * 2 and batch.documents == 1
    assert (batch.targets[0, :, -1] >= 0).all()


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        pytest.param({"source": "needle", "num_queries": 2}, "num_queries ≤ num_needles", id="more queries"),
        pytest.param({"source": "needle", "num_needles": 65}, "num_needles ≤ num_keys", id="more needles than keys"),
        pytest.param({"source": "needle", "num_values": 1}, "at least 2", id="one value"),
        pytest.param({"source": "needle", "value_tokens": 0}, "value_tokens 0", id="no value"),
        pytest.param({"source": "needle", "depth": 1.5}, r"depth is 1\.5 with 1 queries", id="depth beyond"),
        pytest.param(
            {"source": "needle", "depth": 0.5, "num_needles": 2, "num_queries": 2}, "of one needle", id="depth of two"
        ),
        pytest.param({"source": "needle", "haystack": 0}, "noise needs at least 1 id", id="no noise"),
        pytest.param(
            {"source": "tracking", "haystack": {"source": "corpsu"}}, "haystack.source is 'corpsu'", id="haystack"
        ),
        pytest.param({"source": "tracking", "num_queries": 3}, "num_queries ≤ num_chains", id="more than chains"),
        pytest.param({"source": "tracking", "num_hops": 40}, "2 chains of 40 hops need 82 names", id="too few names"),
        pytest.param({"source": "tracking", "num_hops": -1}, "of -1 hops", id="negative hops"),
        pytest.param({"source": "tracking", "num_values": 1}, "at least 2", id="one value to hold"),
    ],
)
def test_impossible_tasks_are_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        build(DataConfig, {"train": values}, "data")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        pytest.param({"source": "needle", "num_needles": 5}, "need a sequence length of 11, but it is 10", id="needle"),
        pytest.param({"source": "tracking"}, "need a sequence length of 14, but it is 10", id="tracking"),
    ],
)
def test_a_window_without_room_is_refused_at_once(values: dict[str, Any], sentence: str) -> None:
    (source,) = DataConfig(values).open_train().sources.values()
    with pytest.raises(Refused, match=sentence):
        Loader(source, sequence_length=10)


@pytest.mark.parametrize("task", ["needle", "tracking"])
@pytest.mark.parametrize("hay", ["needle", "tracking", "recall"])
def test_a_haystack_without_text_is_refused(task: str, hay: str) -> None:
    with pytest.raises(Refused, match=f"the haystack is {hay}, which holds no text"):
        DataConfig({"source": task, "haystack": {"source": hay}}).open_train()
