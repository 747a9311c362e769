"""Lightning indexers: scores, choice, and what teaches them, against the formulas written out query by query."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models.contract import NOTHING, Entries, Visibility
from models.cores import gathered, plain
from models.selection import index as indexing
from models.selection import ranges, teacher
from models.selection.index import Index, choose, present, scores
from models.selection.teacher import Attended, divergence, teach_all, teach_chosen
from models.selection.top import NOWHERE, top
from models.sequence import Whole
from tests.schemes import packed

SCALE = 0.6

PACKED = [
    pytest.param(Whole.rows(2, 11), id="one document"),
    pytest.param(packed([[1, 6, 4], [7, 2]]), id="packed and padded"),
]

TILES = [pytest.param(2**26, id="one tile"), pytest.param(60, id="many tiles"), pytest.param(1, id="query by query")]


def entries_of(whole: Whole, stride: int) -> Entries:
    """One entry a token, or one for each `stride` tokens of a row's first document."""
    if stride == 1:
        return Entries({}, whole.position, whole.document, aligned=True)
    ends = slice(stride - 1, None, stride)
    document = whole.document[:, ends].masked_fill(whole.position[:, ends] % stride != stride - 1, NOTHING)
    return Entries({}, whole.position[:, ends], document)


def drawn(whole: Whole, num_entries: int, seed: int = 0) -> tuple[Index, Tensor, Tensor, Tensor, Tensor]:
    """index, its key, and the main attention's query, key and what else is in its denominator; sizes all differ."""
    generator = torch.Generator().manual_seed(seed)
    rows, length = whole.position.shape

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    index = Index(normal(rows, length, 3, 4), normal(rows, length, 3))
    heads = normal(rows, length, 2, 5), normal(rows, num_entries, 5), normal(rows, length, 2)
    return index, normal(rows, num_entries, 4), *heads


def read_chosen(query: Tensor, key: Tensor, places: Tensor, rest: Tensor | None = None) -> tuple[Tensor, ...]:
    """One KV head, whose key comes in two parts, the first of them the value. Output, log-sum-exp, mass [B, S, k]."""
    parts = tuple(part.unsqueeze(2) for part in (key[..., :2], key[..., 2:]))
    out, lse, mass = gathered.core(query, parts, gathered.Chosen(places.unsqueeze(2)), SCALE, rest)
    return out, lse, mass.squeeze(2)


def by_hand(index: Index, key: Tensor, b: int, s: int, t: int) -> Tensor:
    products = (index.query[b, s] @ key[b, t]).relu()
    return (index.weight[b, s] * products).sum()


def mass_by_hand(query: Tensor, key: Tensor, rest: Tensor | None, candidates: list[int], b: int, s: int) -> Tensor:
    """Σ over heads of exp(z) / (rest + Σ exp(z)), for each candidate."""
    total = torch.zeros(len(candidates), dtype=torch.float64)
    for h in range(query.shape[2]):
        exps = (SCALE * key[b, candidates] @ query[b, s, h]).exp()
        total = total + exps / (exps.sum() + (0 if rest is None else rest[b, s, h].exp()))
    return total.detach()


def lesson_by_hand(
    index: Index, key: Tensor, main: tuple[Tensor, Tensor, Tensor | None], candidates: Callable[[int, int], list[int]]
) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for b in range(key.shape[0]):
        for s in range(index.query.shape[1]):
            chosen = candidates(b, s)
            if not chosen:
                continue
            query, main_key, rest = main
            mass = mass_by_hand(query, main_key, rest, chosen, b, s)
            student = torch.stack([by_hand(index, key, b, s, t) for t in chosen]).log_softmax(0)
            p = mass / mass.sum()
            total = total + (p * (p.log() - student)).sum()
    return total


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("whole", PACKED)
def test_choice_is_the_best_of_what_is_visible(
    whole: Whole, stride: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "TILE_NUMBERS", tile)
    entries = entries_of(whole, stride)
    visibility = Visibility.of(entries, whole)
    index, key, *_ = drawn(whole, entries.position.shape[1])
    chosen, mask = choose(index, key, visibility, 3), visibility.mask()
    for b, s in torch.cartesian_prod(*map(torch.arange, whole.position.shape)).tolist():
        visible = [t for t in range(key.shape[1]) if mask[b, s, t]]
        best = sorted(visible, key=lambda t: -by_hand(index, key, b, s, t).item())[:3]
        expected = sorted(best) + [NOWHERE] * (min(3, key.shape[1]) - len(best))
        assert chosen[b, s].tolist() == expected


@pytest.mark.parametrize(
    ("values", "visible", "k", "expected"),
    [
        pytest.param([0, 0, 0, 0], [1, 1, 1, 1], 2, [0, 1], id="all equal"),
        pytest.param([0, 5, 0, 0], [1, 1, 1, 1], 2, [0, 1], id="one above"),
        pytest.param([0, 5, 0, 7], [1, 1, 1, 1], 2, [1, 3], id="two above"),
        pytest.param([9, 0, 9, 0], [0, 1, 0, 1], 1, [1], id="hidden ones are higher"),
        pytest.param([-3, -2, -4, -1], [1, 1, 1, 0], 2, [0, 1], id="negative"),
        pytest.param([-3, -2, -4, -1], [0, 0, 1, 0], 3, [2, -1, -1], id="fewer than k"),
        pytest.param([1, 2], [0, 0], 2, [-1, -1], id="nothing visible"),
        pytest.param([1, 2], [1, 1], 5, [0, 1, -1, -1, -1], id="k beyond all"),
        pytest.param([-math.inf, 2, -math.inf], [1, 1, 1], 2, [0, 1], id="minus infinity is a score"),
    ],
)
def test_top_breaks_ties_to_the_lowest_place(
    values: list[float], visible: list[int], k: int, expected: list[int]
) -> None:
    scores, mask = torch.tensor([[values]], dtype=torch.float64), torch.tensor([[visible]]).bool()
    assert top(scores, mask, k)[0, 0].tolist() == expected


def test_padding_before_the_entries_moves_the_choice_and_changes_nothing_else() -> None:
    """As many ties as can be: heads whose products are all below zero."""
    index, key, *_ = drawn(Whole.rows(1, 9), 9)
    index = Index(index.query.abs(), index.weight)
    key = torch.where(torch.arange(9)[None, :, None] % 3 == 0, key, -key.abs())
    visibility = Visibility.of(entries_of(Whole.rows(1, 9), 1), Whole.rows(1, 9))
    plainly = choose(index, key, visibility, 4)
    hidden = torch.full((1, 5), NOTHING)
    padded = Visibility(
        visibility.query_position,
        visibility.query_document,
        torch.cat((hidden, visibility.position), 1),
        torch.cat((hidden, visibility.document), 1),
    )
    shifted = choose(index, torch.cat((torch.randn(1, 5, 4, dtype=key.dtype), key), 1), padded, 4)
    assert torch.equal(torch.where(present(plainly), plainly + 5, NOWHERE), shifted)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("joint", [False, True], ids=["alone", "beside a window and a sink"])
@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("whole", PACKED)
def test_lesson_of_all_visible_entries(
    whole: Whole, stride: int, joint: bool, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "TILE_NUMBERS", tile)
    entries = entries_of(whole, stride)
    visibility = Visibility.of(entries, whole)
    index, key, query, main_key, beside = drawn(whole, entries.position.shape[1])
    rest, mask = beside if joint else None, visibility.mask()
    attended = Attended(query, main_key.unsqueeze(2), SCALE, rest)
    lesson = teach_all(index, key, attended, visibility, 2, whole)

    def candidates(b: int, s: int) -> list[int]:
        return [t for t in range(key.shape[1]) if mask[b, s, t]]

    expected = lesson_by_hand(index, key, (query, main_key, rest), candidates)
    check_lesson(lesson.kl, expected, index, key, (query, main_key, beside))
    seeing = [(b, s) for b in range(mask.shape[0]) for s in range(mask.shape[1]) if mask[b, s].any()]
    assert lesson.report["kl"].tolist() == pytest.approx([expected.item(), len(seeing)])
    held = 0.0
    for b, s in seeing:
        all_visible = candidates(b, s)
        best = sorted(range(len(all_visible)), key=lambda i: -by_hand(index, key, b, s, all_visible[i]).item())[:2]
        mass = mass_by_hand(query, main_key, rest, all_visible, b, s)
        held += float(mass[best].sum() / mass.sum())
    assert lesson.report["recall"].tolist() == pytest.approx([held, len(seeing)])


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("joint", [False, True], ids=["alone", "beside a window and a sink"])
@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("whole", PACKED)
def test_lesson_of_the_chosen_entries(
    whole: Whole, stride: int, joint: bool, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "TILE_NUMBERS", tile)
    monkeypatch.setattr(gathered, "TILE_NUMBERS", tile)
    entries = entries_of(whole, stride)
    visibility = Visibility.of(entries, whole)
    index, key, query, main_key, beside = drawn(whole, entries.position.shape[1])
    rest = beside if joint else None
    places = choose(index, key, visibility, 3)
    _, _, mass = read_chosen(query, main_key, places, rest)
    attended = Attended(query, main_key.unsqueeze(2), SCALE, rest)
    lesson = teach_chosen(index, key, mass, places, attended, visibility, whole)

    def candidates(b: int, s: int) -> list[int]:
        return [t for t in places[b, s].tolist() if t != NOWHERE]

    expected = lesson_by_hand(index, key, (query, main_key, rest), candidates)
    check_lesson(lesson.kl, expected, index, key, (query, main_key, beside))
    assert lesson.report["kl"].tolist() == pytest.approx([expected.item(), int(present(places).any(-1).sum())])
    held, asked = lesson.report["recall"].tolist()
    assert 0 < held <= asked <= teacher.SAMPLED * len(places)


def check_lesson(kl: Tensor, expected: Tensor, index: Index, key: Tensor, main: tuple[Tensor, ...]) -> None:
    """The value, the gradient in the index, and none in what the main attention scored."""
    torch.testing.assert_close(kl, expected, rtol=1e-9, atol=1e-12)
    ours = torch.autograd.grad(3 * kl, [*index, key, *main], allow_unused=True)
    theirs = torch.autograd.grad(3 * expected, [*index, key])
    for mine, other in zip(ours[:3], theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)
    assert all(gradient is None for gradient in ours[3:])


def test_recall_is_whole_when_everything_is_chosen() -> None:
    whole = packed([[1, 6, 4], [7, 2]])
    entries = entries_of(whole, 1)
    visibility = Visibility.of(entries, whole)
    index, key, query, main_key, _ = drawn(whole, 11)
    places = choose(index, key, visibility, 11)
    attended = Attended(query, main_key.unsqueeze(2), SCALE)
    _, _, mass = read_chosen(query, main_key, places)
    for lesson in (
        teach_all(index, key, attended, visibility, 11, whole),
        teach_chosen(index, key, mass, places, attended, visibility, whole),
    ):
        held, asked = lesson.report["recall"]
        torch.testing.assert_close(held, asked)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("whole", PACKED)
def test_gathered_core_is_the_plain_one_under_a_mask(whole: Whole, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathered, "TILE_NUMBERS", tile)
    index, key, query, main_key, _ = drawn(whole, 11)
    visibility = Visibility.of(entries_of(whole, 1), whole)
    places = choose(index, key, visibility, 3)
    out, lse, _ = read_chosen(query, main_key, places)

    class Chosen(Visibility):
        def mask(self) -> Tensor:
            hit = torch.zeros(*places.shape[:2], 12, dtype=torch.bool)
            return hit.scatter(-1, torch.where(present(places), places, 11), True)[..., :11]

    under = Chosen.of(entries_of(whole, 1), whole)
    expected, expected_lse = plain.core(
        query, main_key.unsqueeze(2), main_key[..., :2].unsqueeze(2), under, SCALE, lse=True
    )
    assert expected_lse is not None
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-9, atol=1e-12)
    pairs = ((out, lse), (expected, expected_lse))
    ours, theirs = (torch.autograd.grad(a.square().sum() + b[b.isfinite()].sum(), [query, main_key]) for a, b in pairs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("beyond", [0, 2])
def test_ranges_are_found_wherever_their_entries_lie(beyond: int) -> None:
    """Entries in any order, some dropped: of each range what is there, of the query's document, not too near."""
    generator = torch.Generator().manual_seed(0)
    whole = packed([[1, 6, 9, 2], [7, 4, 1]])
    order = torch.stack([torch.randperm(18, generator=generator)[:15] for _ in range(2)])
    entries = Entries({}, whole.position.gather(1, order), whole.document.gather(1, order))
    first = torch.randint(-1, 8, (2, 18, 2, 3), generator=generator)
    places = ranges.find(entries, first, 3, whole, beyond).places()
    for b, s, k in itertools.product(range(2), range(18), range(2)):
        wanted = []
        for begin in first[b, s, k].tolist():
            for position in range(begin, begin + 3) if begin != NOWHERE else ():
                there = (entries.document[b] == whole.document[b, s]) & (entries.position[b] == position)
                if position <= whole.position[b, s] - beyond and whole.document[b, s] != NOTHING:
                    wanted += there.nonzero().flatten().tolist()
        assert [place for place in places[b, s, k].tolist() if place != NOWHERE] == wanted


def test_a_query_with_no_candidate_is_worth_nothing_and_nan_of_nothing() -> None:
    student = torch.tensor([[[1.0, math.inf, 2.0], [math.nan, 0.0, 0.0]]])
    mass = torch.tensor([[[0.5, 7.0, 0.25], [1.0, 1.0, 1.0]]])
    mask = torch.tensor([[[True, False, True], [False, False, False]]])
    kl, gradient = divergence(student, mass, mask)
    assert kl.isfinite().all() and gradient.isfinite().all()
    assert kl[0, 1] == 0 and not gradient[0, 1].any() and gradient[0, 0, 1] == 0


def test_scores_are_summed_in_fp32() -> None:
    index, key, *_ = drawn(Whole.rows(1, 9), 9)
    low = Index(index.query.bfloat16(), index.weight.float())
    assert scores(low, key.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(scores(low, key.bfloat16()).double(), scores(index, key), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("lead", "expected"), [(1, 20), (2, 15), (4, 8), (20, 0)])
def test_readers_are_counted(lead: int, expected: int) -> None:
    """Documents of 1, 6, 4, 7 and 2 tokens: from the last token of its first block on, a query sees an entry."""
    assert int(packed([[1, 6, 4], [7, 2]]).readers(lead)) == expected
