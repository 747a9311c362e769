"""DeepSeek-V4's sparse and windowed layers against the report's equations, token by token; what teaches the indexer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from conf import schema
from models import cost, mechanism
from models.attention.csa import CSA
from models.contract import Result
from models.mode import Mode
from models.sequence import Whole
from models.storage import Storage
from tests import schemes
from tests.schemes import Row, layer
from tests.test_attention import WIDTH, build, run, turned, unit

LENGTH = 17


def entries_by_block(compressor: Any, x: Tensor) -> list[Tensor]:
    """Each complete block's entry, from its own rows (the second half) and those of the block before (the first)."""
    size, rate = compressor.size, compressor.rate
    value, gate = ([linear.weight @ a for a in x] for linear in (compressor.value, compressor.gate))
    gate = [g + compressor.position_bias[t % rate] for t, g in enumerate(gate)]
    entries = []
    for i in range(len(x) // rate):
        before, own = range(rate * (i - 1), rate * i), range(rate * i, rate * (i + 1))
        gates = [gate[t][:size] for t in before if i > 0] + [gate[t][size:] for t in own]
        values = [value[t][:size] for t in before if i > 0] + [value[t][size:] for t in own]
        entry = sum(w * v for w, v in zip(torch.stack(gates).softmax(0), values, strict=True))
        assert isinstance(entry, Tensor)
        entry = unit(entry) * compressor.norm.gain
        entries.append(turned(entry, compressor.blocks.rope_dim, rate * i, compressor.blocks.rope.base))
    return entries


def read_by_token(attention: Any, x: Tensor, blocks: list[Tensor], chosen: Callable[[int], list[int]]) -> Tensor:
    """A window, the chosen blocks and a sink in one softmax; grouped output. x: [S, D]."""
    c, outs = attention.config, []
    window = [
        turned(unit(attention.kv.weight @ a) * attention.kv_norm.gain, c.rope_dim, t, c.rope.base)
        for t, a in enumerate(x)
    ]
    for t, a in enumerate(x):
        low = unit(attention.query_down.weight @ a) * attention.query_norm.gain
        entries = torch.stack(window[max(0, t - c.window + 1) : t + 1] + [blocks[i] for i in chosen(t)])
        heads = []
        for h, query in enumerate((attention.query.weight @ low).view(c.heads, c.head_dim)):
            exps = (entries @ turned(unit(query), c.rope_dim, t, c.rope.base) / math.sqrt(c.head_dim)).exp()
            out = exps @ entries / (exps.sum() + attention.sink[h].exp())
            heads.append(turned(out, c.rope_dim, -t, c.rope.base))
        groups = torch.cat(heads).view(c.output.groups, -1)
        narrow = [matrix @ group for matrix, group in zip(attention.output.narrow.weight, groups, strict=True)]
        outs.append(attention.output.wide.weight @ torch.cat(narrow))
    return torch.stack(outs)


def scores_by_token(attention: Any, x: Tensor) -> list[list[Tensor]]:
    """scores[t][i] of every block that is complete by token t."""
    c, indexer, scores = attention.config, attention.config.indexer, []
    keys = entries_by_block(attention.index_compressor, x)
    for t, a in enumerate(x):
        low = unit(attention.query_down.weight @ a) * attention.query_norm.gain
        queries = (attention.index_query.query.weight @ low).view(indexer.heads, indexer.head_dim)
        weights = attention.index_query.weight.weight @ a / math.sqrt(indexer.heads * indexer.head_dim)
        queries = [turned(query, c.rope_dim, t, c.rope.base) for query in queries]
        of_block = [[w * (q @ key).relu() for w, q in zip(weights, queries, strict=True)] for key in keys]
        scores.append([torch.stack(heads).sum() for heads in of_block[: (t + 1) // c.rate]])
    return scores


def best(scores: list[Tensor], k: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i].item(), i))[:k])


def gradients(y: Tensor, attention: Any) -> dict[str, Tensor]:
    seed = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(5))
    names, parameters = zip(*attention.named_parameters(), strict=True)
    taken = torch.autograd.grad((y * seed).sum(), parameters, materialize_grads=True)
    return dict(zip(names, taken, strict=True))


def assert_same(attention: Any, x: Tensor, expected: Tensor) -> None:
    """Outputs, and the gradients of the language model's loss."""
    ours = run(attention, x[None], Whole.rows(1, len(x)))[0]
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    theirs = gradients(expected, attention)
    for name, gradient in gradients(ours, attention).items():
        assert torch.allclose(gradient, theirs[name], rtol=1e-9, atol=1e-9), name


def drawn() -> Tensor:
    return torch.randn(LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mode", ["dense", "warmup", "sparse"])
@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(schemes.csa(), id="rate 4 top 3"),
        pytest.param(schemes.csa(top_k=1, rate=2, window=1, output={"groups": 1, "rank": 5}), id="rate 2 top 1"),
        pytest.param(
            schemes.csa(top_k=2, rate=3, rope={"base": 30.0, "pairing": "interleaved"}, window=30), id="rate 3 top 2"
        ),
        pytest.param(schemes.csa(top_k=9), id="more than there are"),
        pytest.param(schemes.csa(rate=40), id="no block is complete"),
    ],
)
def test_csa_is_its_equations(plan: schemes.Plan, mode: Mode) -> None:
    attention, x = build(plan), drawn()
    attention.mode = mode
    blocks, scores = entries_by_block(attention.compressor, x), scores_by_token(attention, x)
    k = attention.config.indexer.top_k if mode == "sparse" else LENGTH
    assert_same(attention, x, read_by_token(attention, x, blocks, lambda t: best(scores[t], k)))


def test_swa_is_its_equations() -> None:
    attention, x = build(schemes.swa()), drawn()
    assert_same(attention, x, read_by_token(attention, x, [], lambda t: []))


def attended(attention: CSA, x: Tensor) -> Result:
    sequence = Whole.rows(1, len(x))
    query, state = attention.compress(x[None], sequence)
    return attention.attend(query, sequence.collect(attention.slots(), state), sequence)


INDEXER = ("index_query", "index_compressor")


@pytest.mark.parametrize("mode", ["warmup", "sparse"])
def test_the_indexer_learns_from_the_main_softmax(mode: Mode) -> None:
    """KL by hand: the teacher's denominator holds window and sink, the student's softmax all candidates' scores; a mean
    over the queries that see a block. It moves the indexer alone, which the output does not move."""
    attention, x = build(schemes.csa(top_k=2)), drawn().requires_grad_()
    attention.mode = mode
    c, blocks, scores = attention.config, entries_by_block(attention.compressor, x), scores_by_token(attention, x)
    base, total, queries = c.rope.base, torch.zeros((), dtype=torch.float64), 0
    for t, a in enumerate(x):
        candidates = best(scores[t], 2) if mode == "sparse" else list(range(len(scores[t])))
        if not candidates:
            continue
        low = unit(attention.query_down.weight @ a) * attention.query_norm.gain
        mass = torch.zeros(len(candidates), dtype=torch.float64)
        for h, query in enumerate((attention.query.weight @ low).view(c.heads, c.head_dim)):
            query = turned(unit(query), c.rope_dim, t, base)

            def weight(entry: Tensor, query: Tensor = query) -> Tensor:
                return (entry @ query / math.sqrt(c.head_dim)).exp()

            near = range(max(0, t - c.window + 1), t + 1)
            window = [
                turned(unit(attention.kv.weight @ x[s]) * attention.kv_norm.gain, c.rope_dim, s, base) for s in near
            ]
            exps = torch.stack([weight(blocks[i]) for i in candidates])
            rest = torch.stack([weight(entry) for entry in window]).sum() + attention.sink[h].exp()
            mass += (exps / (exps.sum() + rest)).detach()
        teacher = mass / mass.sum()
        student = torch.stack([scores[t][i] for i in candidates]).log_softmax(0)
        total, queries = total + (teacher * (teacher.log() - student)).sum(), queries + 1
    result = attended(attention, x)
    assert result.extra is not None
    torch.testing.assert_close(result.extra, c.indexer.kl_loss * total / queries, rtol=1e-9, atol=1e-12)
    assert result.report["kl"].tolist() == pytest.approx([total.item(), queries])
    assert result.report["recall"][1] > 0
    wanted = gradients(c.indexer.kl_loss * total[None] / queries, attention)
    for name, gradient in gradients(result.extra[None], attention).items():
        if name.startswith(INDEXER):
            assert gradient.norm() > 0, name
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-8, atol=1e-12, msg=name)
        else:
            assert not gradient.any(), f"the indexer's loss moves {name}"
    (to_x,) = torch.autograd.grad(result.extra, x, retain_graph=True, materialize_grads=True)
    assert not to_x.any()
    for name, gradient in gradients(result.y, attention).items():
        assert gradient.any() != name.startswith(INDEXER), name


def test_a_dense_layer_keeps_no_index() -> None:
    attention = build(schemes.csa())
    attention.mode = "dense"
    assert [slot.name for slot in attention.slots()] == ["window", "blocks", "last_block", "open_block"]
    assert attended(attention, drawn()).extra is None
    with torch.no_grad():
        attention.mode = "sparse"
        assert attended(attention, drawn()).extra is None, "nobody learns from it"


def test_tails_are_as_long_as_the_next_entry_needs() -> None:
    """Between two blocks, the one before is wanted whole; decode keeps that and not a row more."""
    rows = {slot.name: slot.rows for slot in build(schemes.csa(rate=4)).slots() if slot.kind == "tail"}
    assert rows == {"last_block": 7, "open_block": 3, "index_last_block": 7, "index_open_block": 3}


def test_entries_are_packed_as_in_the_kernels_of_deepseek() -> None:
    """448 fp8 and 64 bf16 with 7 scales and a byte of padding; 128 fp4 with 4 scales."""
    sizes: dict[str, Any] = {
        "heads": 2,
        "head_dim": 512,
        "rope_dim": 64,
        "output": {"groups": 1, "rank": 8},
        "window": 128,
    }
    indexer = {"heads": 2, "head_dim": 128, "top_k": 512}
    model = cost.meta(Row((layer(schemes.csa(**sizes, indexer=indexer)),)).config())
    packed = {slot.name: Storage("packed").bytes(slot) for slot in cost.written_slots(model) if slot.kind == "entry"}
    assert packed == {"window": 584, "blocks": 584, "index": 68}
    plain = {slot.name: cost.AS_DECLARED.bytes(slot) for slot in cost.written_slots(model) if slot.kind == "entry"}
    assert plain == {"window": 1024, "blocks": 1024, "index": 256}


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        pytest.param(schemes.csa(top_k=0), "top_k", id="top-k of nothing"),
        pytest.param(schemes.csa(indexer={"heads": 2, "head_dim": 2, "top_k": 1}), "rotated", id="narrow index"),
        pytest.param(schemes.csa(indexer=None), "indexer", id="no indexer"),
        pytest.param(schemes.csa(rate=1), "rate", id="a block of one token"),
        pytest.param(schemes.csa(window=0), "window", id="a window of nothing"),
        pytest.param({**schemes.swa(), "rate": 4}, "rate", id="a rate without blocks"),
        pytest.param(schemes.swa(output={"groups": 3, "rank": 5}), "multiple of output.groups", id="heads over groups"),
    ],
)
def test_an_impossible_layer_is_refused(plan: schemes.Plan, words: str) -> None:
    with pytest.raises(schema.Refused, match=words):
        mechanism.config_of("attention", plan, "model.layers[0].of[0].attention")
