"""The order of data is a pure function of corpus and seed; nothing is lost, repeated or leaked across documents."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conf.schema import Refused
from data.batch import IGNORE, Batch
from data.corpus import Config, Corpus
from data.loader import Loader
from tests.corpora import write_corpus


@dataclass(frozen=True)
class Case:
    """Document lengths of a corpus in which every token is another id, and how it is read."""

    lengths: list[int]
    sequence_length: int
    depth: int
    seed: int

    @property
    def documents(self) -> list[list[int]]:
        ends = torch.tensor(self.lengths).cumsum(0).tolist()
        return [list(range(end - n, end)) for n, end in zip(self.lengths, ends, strict=True)]

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def loader(self, source: Corpus, rank: int = 0, world_size: int = 1) -> Loader:
        return Loader(
            source,
            sequence_length=self.sequence_length,
            depth=self.depth,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
        )

    def global_batch(self, source: Corpus, consumed: int, num_samples: int, world_size: int) -> Batch:
        """All ranks' shares, joined."""
        shares = [self.loader(source, r, world_size).batch(consumed, num_samples) for r in range(world_size)]
        return Batch(
            ids=torch.cat([b.ids for b in shares]),
            targets=torch.cat([b.targets for b in shares], dim=1),
            ahead=torch.cat([b.ahead for b in shares], dim=1),
            position=torch.cat([b.position for b in shares]),
            document=torch.cat([b.document for b in shares]),
            scored=sum(b.count() for b in shares),
            documents=max(b.documents for b in shares),
            digest=f"{sum(int(b.digest, 16) for b in shares) % 2**64:016x}",
        )


cases = st.builds(
    Case,
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any),
    sequence_length=st.integers(1, 33),
    depth=st.integers(0, 2),
    seed=st.integers(0, 3),
)


@contextmanager
def opened(case: Case) -> Iterator[Corpus]:
    with tempfile.TemporaryDirectory() as folder:
        yield Config(str(write_corpus(Path(folder), case.documents, max(case.num_tokens, 1)))).open()


def same(a: Batch, b: Batch) -> bool:
    pairs = [(a.ids, b.ids), (a.targets, b.targets), (a.position, b.position), (a.document, b.document)]
    facts = [(x.count(), x.documents, x.digest) for x in (a, b)]
    return all(torch.equal(x, y) for x, y in pairs) and facts[0] == facts[1]


@given(cases)
def test_each_epoch_holds_every_document_once_and_whole(case: Case) -> None:
    """Windows join to one stream of inputs; each epoch of it is a permutation of the documents."""
    with opened(case) as source:
        loader = case.loader(source)
        num_windows = -(-3 * case.num_tokens // case.sequence_length)
        stream = loader.batch(0, num_windows).ids.flatten().tolist()
    for epoch in range(3):
        rest = stream[epoch * case.num_tokens : (epoch + 1) * case.num_tokens]
        left = {document[0]: document for document in case.documents if document}
        while rest:
            document = left.pop(rest[0])
            assert rest[: len(document)] == document
            rest = rest[len(document) :]
        assert not left


@given(cases, st.integers(0, 20), st.integers(1, 5))
def test_order_is_the_same_for_any_number_of_ranks_and_after_a_resume(case: Case, consumed: int, steps: int) -> None:
    with opened(case) as source:
        whole = case.global_batch(source, 0, consumed + 4 * steps, 1)
        for world_size in (1, 2, 4):
            for step in range(steps):
                at = consumed + 4 * step
                joined = case.global_batch(source, at, 4, world_size)
                rows = slice(at, at + 4)
                assert torch.equal(joined.ids, whole.ids[rows])
                assert torch.equal(joined.targets, whole.targets[:, rows])
                assert same(joined, case.global_batch(source, at, 4, 1))


@given(cases, st.integers(0, 20))
def test_targets_positions_and_documents_are_those_of_the_plain_twin(case: Case, consumed: int) -> None:
    """The twin walks the stream token by token; a token's id tells its document and its place there."""
    place = {token: (d, at) for d, document in enumerate(case.documents) for at, token in enumerate(document)}
    S = case.sequence_length
    with opened(case) as source:
        batch = case.loader(source).batch(consumed, 3)
        rows = [source.window(consumed + row, S, 1 + case.depth, case.seed).tokens.tolist() for row in range(3)]
    scored = 0
    for row, tokens in enumerate(rows):
        piece, position = [0], [0]
        for before, token in pairwise(tokens):
            document, at = place[before]
            goes_on = place[token] == (document, at + 1)
            piece.append(piece[-1] if goes_on else piece[-1] + 1)
            position.append(position[-1] + 1 if goes_on else 0)
        assert batch.ids[row].tolist() == tokens[:S]
        assert batch.document[row].tolist() == piece[:S]
        assert batch.position[row].tolist() == position[:S]
        for d in range(1 + case.depth):
            expected = [tokens[s + 1 + d] if piece[s + 1 + d] == piece[s] else IGNORE for s in range(S)]
            assert batch.targets[d, row].tolist() == expected
            if d < case.depth:
                assert batch.ahead[d, row].tolist() == expected
            scored += sum(t != IGNORE for t in expected) if d == 0 else 0
    assert batch.count() == scored
    assert batch.documents == int(batch.document.max()) + 1


@given(cases, st.sampled_from([1, 2, 4]), st.sampled_from([4, 8]))
def test_validation_scores_each_target_of_an_epoch_once(case: Case, world_size: int, batch_size: int) -> None:
    with opened(case) as source:
        ranks = [list(case.loader(source, r, world_size).fixed(None, batch_size)) for r in range(world_size)]
    assert len({tuple(batch.ids.shape for batch in batches) for batches in ranks}) == 1
    for d in range(1 + case.depth):
        targets = torch.cat([batch.targets[d].flatten() for batches in ranks for batch in batches])
        scored = sorted(targets[targets != IGNORE].tolist())
        # A window's first d inputs have their targets at distance 1 + d; those before the window reach into it.
        assert scored == sorted(token for document in case.documents for token in document[1 + d :])
    assert sum(b.count() for batches in ranks for b in batches) == sum(max(n - 1, 0) for n in case.lengths)


@given(cases, st.integers(1, 9))
def test_validation_on_a_number_of_samples_takes_them_from_everywhere(case: Case, num_samples: int) -> None:
    """The same each time, no window twice, and as far from one to the next."""
    with opened(case) as source:
        loader = case.loader(source)
        total = -(-case.num_tokens // case.sequence_length)
        taken = min(num_samples, total)
        once, again = (list(loader.fixed(num_samples, 4)) for _ in range(2))
        windows = [loader.batch(n * total // taken, 1) for n in range(taken)]
    assert all(same(a, b) for a, b in zip(once, again, strict=True))
    filled = windows + [windows[-1]] * (4 * len(once) - taken)
    assert torch.equal(torch.cat([b.ids for b in once]), torch.cat([w.ids for w in filled])), "of no other epoch"
    assert sum(b.count() for b in once) <= sum(w.count() for w in windows)


CASE = Case(lengths=[30, 1, 17, 4, 60, 9, 2, 45], sequence_length=8, depth=1, seed=0)


def test_stream_is_batch_after_batch() -> None:
    with opened(CASE) as source:
        loader = CASE.loader(source, rank=1, world_size=2)
        with loader.stream(6, 4) as stream:
            for step in range(50):
                batch = next(stream)
                expected = loader.batch(6 + 4 * step, 4)
                assert same(batch, expected)


def test_seed_and_epoch_change_the_order() -> None:
    num_windows = CASE.num_tokens // CASE.sequence_length
    assert num_windows * CASE.sequence_length == CASE.num_tokens, "so that an epoch begins with a window"
    with opened(CASE) as source:
        orders = {
            tuple(
                Loader(source, sequence_length=8, seed=seed)
                .batch(epoch * num_windows, num_windows)
                .ids.flatten()
                .tolist()
            )
            for seed in (0, 1)
            for epoch in (0, 1)
        }
    assert len(orders) == 4


def test_the_digest_tells_content_borders_and_place_apart(tmp_path: Path) -> None:
    def digest(name: str, documents: list[list[int]], consumed: int = 0) -> str:
        folder = write_corpus(tmp_path / name, documents, vocab=9)
        return Loader(Config(str(folder)).open(), sequence_length=4).batch(consumed, 1).digest

    first = digest("a", [[1, 1, 1, 1, 1]])
    assert digest("same", [[1, 1, 1, 1, 1]]) == first
    others = [digest("content", [[2, 2, 2, 2, 2]]), digest("border", [[1], [1, 1, 1, 1]]), digest("a", [[1] * 5], 5)]
    assert len({first, *others}) == 4


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        pytest.param(lambda s: Loader(s, sequence_length=0), "sequence length 0", id="no-sequence"),
        pytest.param(lambda s: Loader(s, sequence_length=8, depth=-1), "depth -1", id="negative-depth"),
        pytest.param(lambda s: Loader(s, sequence_length=8, rank=2, world_size=2), "rank 2 is not one of 2", id="rank"),
        pytest.param(
            lambda s: Loader(s, sequence_length=8, world_size=4).batch(0, 6),
            "6 samples cannot be shared evenly by 4",
            id="uneven-shares",
        ),
        pytest.param(
            lambda s: Loader(s, sequence_length=8, world_size=4).stream(0, 6),
            "take a multiple of 4",
            id="uneven-stream",
        ),
    ],
)
def test_impossible_reading_is_refused(make: object, sentence: str) -> None:
    with opened(CASE) as source, pytest.raises(Refused, match=sentence):
        make(source)  # type: ignore[operator]


def test_an_id_beyond_the_vocabulary_is_told(tmp_path: Path) -> None:
    source = Config(str(write_corpus(tmp_path, [[1, 2, 70]], vocab=64))).open()
    with pytest.raises(ValueError, match="token id 70, beyond its vocabulary of 64"):
        Loader(source, sequence_length=2).batch(0, 2)
