"""Softmax cores and their merge, against attention written query by query."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from models.contract import NOTHING, Entries, Slot, Visibility
from models.cores import blockwise, fused, plain
from models.cores.merge import Core, read
from models.sequence import Whole
from tests.schemes import packed
from tests.watch import Watch

SCALE = 0.37


@dataclass(frozen=True)
class Case:
    """The tokens in hand, and the entries they look at: their own where `entries` is None."""

    sequence: Whole
    entries: tuple[list[list[int]], list[list[int]]] | None = None
    reach: int | None = None

    def visibility(self) -> Visibility:
        if self.entries is None:
            entries = Entries({}, self.sequence.position, self.sequence.document, aligned=True)
        else:
            position, document = self.entries
            entries = Entries({}, torch.tensor(position), torch.tensor(document))
        return Visibility.of(entries, self.sequence, self.reach)


def decode(position: int) -> Whole:
    return Whole(torch.tensor([[position], [position - 3]]), torch.zeros(2, 1, dtype=torch.int64))


BLOCKS = ([[3, 7, 11, -1], [3, 1, 5, 9]], [[0, 0, 0, NOTHING], [0, 1, 1, 2]])
UNORDERED = ([[8, 9, 2, 3, 4], [5, -1, 4, -1, 0]], [[0, 0, 0, 0, 0], [0, NOTHING, 0, NOTHING, 0]])

CASES = [
    pytest.param(Case(Whole.rows(2, 12)), id="one document"),
    pytest.param(Case(Whole.rows(2, 12), reach=1), id="itself alone"),
    pytest.param(Case(Whole.rows(2, 12), reach=5), id="window"),
    pytest.param(Case(Whole.rows(2, 12), reach=30), id="window longer than all"),
    pytest.param(Case(packed([[1, 5, 6], [7, 2]])), id="packed and padded"),
    pytest.param(Case(packed([[1, 5, 6], [7, 2]]), reach=3), id="packed window"),
    pytest.param(Case(packed([[12], [4, 4, 4]]), BLOCKS), id="blocks"),
    pytest.param(Case(packed([[12], [4, 4, 4]]), BLOCKS, 6), id="blocks within reach"),
    pytest.param(Case(decode(9), UNORDERED), id="decode from a ring"),
    pytest.param(Case(decode(9), UNORDERED, 4), id="decode from a ring within reach"),
]

HEADS = [pytest.param(4, 4, id="mha"), pytest.param(4, 2, id="gqa"), pytest.param(4, 1, id="mqa")]


def visible(v: Visibility, b: int, s: int) -> list[int]:
    """The rule of the contract, spelt out for one query."""
    seen = []
    for t in range(v.position.shape[1]):
        distance = int(v.query_position[b, s] - v.position[b, t])
        if v.document[b, t] == NOTHING or v.document[b, t] != v.query_document[b, s] or distance < 0:
            continue
        if v.reach is None or distance < v.reach:
            seen.append(t)
    return seen


def by_query(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, sink: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, one query of one head at a time."""
    group = q.shape[2] // k.shape[2]
    out, lse = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype), torch.full(q.shape[:3], -math.inf, dtype=q.dtype)
    for b in range(q.shape[0]):
        for s in range(q.shape[1]):
            seen = visible(visibility, b, s)
            for h in range(q.shape[2]) if seen else ():
                scores = SCALE * k[b, seen, h // group] @ q[b, s, h]
                exps = scores.exp()
                below = exps.sum() + (0 if sink is None else sink[h].exp())
                out[b, s, h] = exps @ v[b, seen, h // group] / below
                lse[b, s, h] = below.log()
    return out, lse


def inputs(visibility: Visibility, heads: int, kv_heads: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """q, k, v with sizes that cannot be taken for each other."""
    (num_rows, queries), entries = visibility.query_position.shape, visibility.position.shape[1]
    shapes = (num_rows, queries, heads, 3), (num_rows, entries, kv_heads, 3), (num_rows, entries, kv_heads, 5)
    return tuple(torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes)


def close(ours: Tensor | None, theirs: Tensor | None, tolerance: float = 1e-10) -> None:
    assert ours is not None
    assert theirs is not None
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def same_gradients(ours: Tensor, theirs: Tensor, leaves: tuple[Tensor, ...], tolerance: float = 1e-10) -> None:
    """Of both with the same random weights."""
    weights = torch.randn_like(theirs)
    grads = torch.autograd.grad((ours * weights).sum(), leaves, retain_graph=True)
    expectations = torch.autograd.grad((theirs * weights).sum(), leaves, retain_graph=True)
    for gradient, expected in zip(grads, expectations, strict=True):
        assert gradient.isfinite().all()
        close(gradient, expected, tolerance)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("case", CASES)
def test_plain_is_attention_query_by_query(case: Case, heads: int, kv_heads: int) -> None:
    visibility = case.visibility()
    q, k, v = inputs(visibility, heads, kv_heads)
    out, lse = plain.core(q, k, v, visibility, SCALE, lse=True)
    expected, expected_lse = by_query(q, k, v, visibility)
    close(out, expected)
    close(lse, expected_lse)
    same_gradients(out, expected, (q, k, v))
    seen = expected_lse.isfinite()
    assert lse is not None
    same_gradients(lse[seen], expected_lse[seen], (q, k))
    close(plain.core(q, k, v, visibility, SCALE)[0], out)


LONG = 2 * blockwise.BLOCK + 9
BLOCKS_OF_LONG = ([list(range(6, LONG, 7)) * 2], [[0] * (LONG // 7) + [1] * (LONG // 7)])


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(Whole.rows(1, LONG)), id="one document"),
        pytest.param(Case(Whole.rows(1, LONG), reach=20), id="window"),
        pytest.param(Case(Whole.rows(1, LONG), reach=blockwise.BLOCK + 1), id="window longer than a block"),
        pytest.param(Case(packed([[300, 1, 200]]), reach=280), id="packed window"),
        pytest.param(Case(packed([[300, LONG - 300]]), BLOCKS_OF_LONG), id="entries that are not the tokens"),
    ],
)
def test_blockwise_is_plain(case: Case) -> None:
    visibility = case.visibility()
    q, k, v = inputs(visibility, 4, 2)
    out, lse = blockwise.core(q, k, v, visibility, SCALE, lse=True)
    expected, expected_lse = plain.core(q, k, v, visibility, SCALE, lse=True)
    close(out, expected)
    close(lse, expected_lse)
    same_gradients(out, expected, (q, k, v))


def test_blockwise_touches_no_entry_out_of_reach() -> None:
    visibility = Case(Whole.rows(1, LONG), reach=20).visibility()
    q, k, v = inputs(visibility, 2, 2)
    with Watch() as watch:
        blockwise.core(q, k, v, visibility, SCALE)
    assert max(shape[-1] for shape in watch.shapes if blockwise.BLOCK in shape) <= blockwise.BLOCK + 19


def test_blockwise_compiles_to_one_graph() -> None:
    visibility = Case(packed([[300, 200]]), reach=20).visibility()
    q, k, v = inputs(visibility, 2, 1, torch.float32)
    compiled = torch.compile(blockwise.core, fullgraph=True, backend="aot_eager")
    out, lse = compiled(q, k, v, visibility, SCALE, lse=True)
    expected, expected_lse = blockwise.core(q, k, v, visibility, SCALE, lse=True)
    close(out, expected, 1e-5)
    close(lse, expected_lse, 1e-5)
    same_gradients(out, expected, (q, k, v), 1e-5)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("case", CASES[:4])
def test_fused_is_plain(case: Case, heads: int, kv_heads: int) -> None:
    """Without the block masks that `prepare` makes on a GPU."""
    visibility = case.visibility()
    q, k, v = inputs(visibility, heads, kv_heads)
    out, _ = fused.core(q, k, v[..., :3], visibility, SCALE)
    expected, _ = plain.core(q, k, v[..., :3], visibility, SCALE)
    close(out, expected)
    same_gradients(out, expected, (q, k, v))


@pytest.mark.parametrize(
    ("case", "lse", "kernel"),
    [
        pytest.param(Case(Whole.rows(1, 40)), False, fused.Kernel.SDPA, id="one document"),
        pytest.param(Case(Whole.rows(1, 40)), True, fused.Kernel.MERGED, id="one document and a sink"),
        pytest.param(Case(Whole.rows(1, 40), reach=7), True, fused.Kernel.FLEX, id="window and a sink"),
        pytest.param(Case(packed([[15, 25]])), False, fused.Kernel.FLEX, id="packed"),
        pytest.param(
            Case(packed([[12, 28]]), ([[3, 7, 11]], [[0, 0, 0]])), False, fused.Kernel.OTHER_ENTRIES, id="blocks"
        ),
    ],
)
def test_every_kernel_of_the_fused_core_is_in_one_graph(
    case: Case, lse: bool, kernel: fused.Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which serves again. Forward alone, and FlexAttention as written: on a CPU it has no backward, and its compiler
    takes long."""
    monkeypatch.setattr(fused, "_compiled", lambda function: function)
    fused.prepare(case.sequence, [Slot("kv", (), reach=case.reach)])
    visibility = case.visibility()
    q, k, v = (leaf.detach() for leaf in inputs(visibility, 4, 2, torch.float32))
    assert fused.kernel(q, k, v, visibility, lse=lse) is kernel
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused.core, fullgraph=True, backend=graphs)
    expected, _ = plain.core(q, k, v[..., :3], visibility, SCALE)
    for _ in range(2):
        out, _ = compiled(q, k, v[..., :3], visibility, SCALE, lse=lse)
        close(out, expected, 1e-5)
    assert graphs.frame_count == 1


@pytest.mark.parametrize("with_sink", [pytest.param(False, id="no sink"), pytest.param(True, id="sink")])
@pytest.mark.parametrize("cuts", [(0,), (2,), (1, 4), (0, 3, 3)])
@pytest.mark.parametrize("case", CASES)
def test_pieces_are_one_softmax(case: Case, cuts: tuple[int, ...], with_sink: bool) -> None:
    """Entries cut into pieces, some of which no query sees and some without an entry."""
    visibility = case.visibility()
    q, k, v = inputs(visibility, 4, 2)
    sink = torch.randn(4, dtype=q.dtype, requires_grad=True) if with_sink else None
    borders = (0, *cuts, k.shape[1])
    readables = [(k[:, a:b], v[:, a:b], visibility.entries(a, b)) for a, b in pairwise(borders)]
    out = read(plain.core, q, readables, SCALE, sink)
    expected, _ = by_query(q, k, v, visibility, sink)
    close(out, expected)
    same_gradients(out, expected, (q, k, v) if sink is None else (q, k, v, sink))


def test_there_must_be_something_to_read() -> None:
    visibility = Case(Whole.rows(1, 4)).visibility().entries(0, 0)
    q, k, v = inputs(visibility, 2, 2)
    with pytest.raises(ValueError, match="piece"):
        read(plain.core, q, [(k, v, visibility)], SCALE)


@pytest.mark.parametrize("core", [pytest.param(plain.core, id="plain"), pytest.param(blockwise.core, id="blockwise")])
@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_query_that_sees_nothing(core: Core, with_sink: bool, dtype: torch.dtype) -> None:
    """Zeros, a log-sum-exp of −inf, and gradients that are zero rather than NaN, however many pieces there are."""
    visibility = Case(packed([[blockwise.BLOCK], []])).visibility()
    q, k, v = inputs(visibility, 2, 1, dtype)
    out, lse = core(q, k, v, visibility, SCALE, lse=True)
    assert lse is not None
    assert (lse[1] == -math.inf).all()
    assert lse[0].isfinite().all()
    assert not out[1].any()
    sink = torch.zeros(2, requires_grad=True) if with_sink else None
    out = read(core, q, [(k, v, visibility)] * 2, SCALE, sink)
    assert out.dtype == dtype
    assert not out[1].any()
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(gradient.isfinite().all() and not gradient[1].any() for gradient in gradients)
    assert gradients[0][0].any()


def test_scores_far_from_zero_do_not_overflow() -> None:
    visibility = Case(Whole.rows(1, 6)).visibility()
    q, k, v = inputs(visibility, 2, 2, torch.float32)
    large = read(plain.core, q, [(k * 1e4, v, visibility)] * 2, SCALE, torch.tensor([1e4, -1e4]))
    assert large.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(large.sum(), (q, k, v)))


@pytest.mark.parametrize(
    ("position", "rate", "entries"),
    [(2, 4, 0), (3, 4, 1), (6, 4, 1), (7, 4, 2), (126, 128, 0), (127, 128, 1), (255, 128, 2)],
)
def test_a_block_is_visible_from_its_last_token(position: int, rate: int, entries: int) -> None:
    """The counts of the DeepSeek-V4 report's reference code."""
    last = torch.arange(rate - 1, 512, rate)[None]
    query = torch.tensor([[position]])
    mask = Visibility(query, torch.zeros_like(query), last, torch.zeros_like(last)).mask()
    assert mask.sum() == entries
