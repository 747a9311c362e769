"""The schemes against their papers' equations, written token by token; what is refused; what is exactly equal."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from conf import schema
from models import mechanism
from models.attention import gqa, hca, mla
from models.cache import Cache
from models.contract import Attention, Slot, all_pairs, visible_pairs
from models.cores import plain
from models.decode import advance, generate
from models.sequence import Whole
from tests import schemes
from tests.schemes import Row, layer, tokens
from tests.watch import Watch

WIDTH, EPS = 16, 1e-6


def build(plan: schemes.Plan) -> Any:
    """One scheme by itself, in float64, every parameter random."""
    attention = mechanism.config_of("attention", plan, "row").build(WIDTH).double()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_(0.3, 0.5)
    return attention


def run(attention: Attention, x: Tensor, sequence: Whole) -> Tensor:
    query, state = attention.compress(x, sequence)
    return attention.attend(query, sequence.collect(attention.slots(), state), sequence).y


def unit(x: Tensor) -> Tensor:
    return x / (x.square().mean() + EPS).sqrt()


def turned(x: Tensor, size: int, position: int, base: float) -> Tensor:
    """The last `size` numbers, in pairs (2i, 2i+1), by position · base^(−2i/size)."""
    y = x.clone()
    first = len(x) - size
    for i in range(size // 2):
        angle = position * base ** (-2 * i / size)
        a, b = x[first + 2 * i], x[first + 2 * i + 1]
        y[first + 2 * i] = a * math.cos(angle) - b * math.sin(angle)
        y[first + 2 * i + 1] = a * math.sin(angle) + b * math.cos(angle)
    return y


def hca_by_token(layer: Any, x: Tensor) -> Tensor:
    """The DeepSeek-V4 report's shared KV head, compressor, sink and grouped output; x: [S, D]."""
    c, base = layer.config, layer.config.rope.base
    window, values, gates = [], [], []
    for t, a in enumerate(x):
        window.append(turned(unit(layer.kv.weight @ a) * layer.kv_norm.gain, c.rope_dim, t, base))
        values.append(layer.compressor.value.weight @ a)
        gates.append(layer.compressor.gate.weight @ a + layer.compressor.position_bias[t % c.rate])
    blocks = []
    for i in range(len(x) // c.rate):
        inside = range(c.rate * i, c.rate * (i + 1))
        weights = torch.stack([gates[t] for t in inside]).softmax(0)
        entry = sum(w * values[t] for w, t in zip(weights, inside, strict=True))
        assert isinstance(entry, Tensor)
        blocks.append(turned(unit(entry) * layer.compressor.norm.gain, c.rope_dim, c.rate * i, base))
    outs = []
    for t, a in enumerate(x):
        low = unit(layer.query_down.weight @ a) * layer.query_norm.gain
        entries = torch.stack(window[max(0, t - c.window + 1) : t + 1] + blocks[: (t + 1) // c.rate])
        heads = []
        for h, query in enumerate((layer.query.weight @ low).view(c.heads, c.head_dim)):
            query = turned(unit(query), c.rope_dim, t, base)
            exps = (entries @ query / math.sqrt(c.head_dim)).exp()
            out = exps @ entries / (exps.sum() + layer.sink[h].exp())
            heads.append(turned(out, c.rope_dim, -t, base))
        groups = torch.cat(heads).view(c.output.groups, -1)
        narrow = [matrix @ group for matrix, group in zip(layer.output.narrow.weight, groups, strict=True)]
        outs.append(layer.output.wide.weight @ torch.cat(narrow))
    return torch.stack(outs)


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(schemes.hca(), id="rate 4 window 5"),
        pytest.param(
            schemes.hca(
                rate=7, window=2, output={"groups": 4, "rank": 5}, rope={"base": 30.0, "pairing": "interleaved"}
            ),
            id="rate 7",
        ),
        pytest.param(
            schemes.hca(rate=2, window=30, output={"groups": 1, "rank": 5}, rope_dim=2), id="rate 2, one group"
        ),
        pytest.param(schemes.hca(rate=40), id="no block is complete"),
    ],
)
def test_hca_is_its_equations(plan: schemes.Plan) -> None:
    attention, x = build(plan), torch.randn(17, WIDTH, dtype=torch.float64)
    ours, theirs = run(attention, x[None], Whole.rows(1, 17))[0], hca_by_token(attention, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    seed = torch.randn_like(theirs)
    gradients, expectations = (
        torch.autograd.grad((y * seed).sum(), list(attention.parameters()), materialize_grads=True)
        for y in (ours, theirs)
    )
    names = [name for name, _ in attention.named_parameters()]
    for name, gradient, expected in zip(names, gradients, expectations, strict=True):
        assert torch.allclose(gradient, expected, rtol=1e-9, atol=1e-9), name


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(schemes.hca(), id="hca"),
        pytest.param(schemes.gqa(), id="gqa"),
        pytest.param(schemes.mla(rope=schemes.YARN), id="mla"),
    ],
)
def test_outputs_do_not_depend_on_where_a_document_starts(plan: schemes.Plan) -> None:
    attention, x = build(plan), torch.randn(2, 13, WIDTH, dtype=torch.float64)
    here = Whole.rows(2, 13)
    there = Whole(here.position + 36, here.document)
    torch.testing.assert_close(run(attention, x, there), run(attention, x, here), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("plan", [schemes.mla(), schemes.mla(latent=3), schemes.mla(query_latent=7, bias=True)])
def test_mla_absorbed_is_expanded(plan: schemes.Plan) -> None:
    """Outputs and gradients, over one piece and over two."""
    attention, sequence = build(plan), schemes.packed([[9, 4], [1, 6]])
    x = torch.randn(2, 13, WIDTH, dtype=torch.float64, requires_grad=True)
    query, state = attention.compress(x, sequence)
    whole = state["latent"]
    parts = [
        type(whole)(
            {name: part[:, cut] for name, part in whole.parts.items()}, whole.position[:, cut], whole.document[:, cut]
        )
        for cut in (slice(0, 5), slice(5, None))
    ]
    leaves = (x, attention.expansion.weight, attention.latent.weight)
    seed = torch.randn(2, 13, 3, attention.config.value_dim, dtype=torch.float64)
    expected = attention._expanded(query, [whole], sequence)
    gradients = torch.autograd.grad((expected * seed).sum(), leaves, retain_graph=True)
    for out in (attention._absorbed(query, [whole], sequence), attention._absorbed(query, parts, sequence)):
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
        for gradient, wanted in zip(
            torch.autograd.grad((out * seed).sum(), leaves, retain_graph=True), gradients, strict=True
        ):
            torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-9)


def test_mla_expands_to_plain_heads() -> None:
    """What the expansion declares, read by the plain core: multi-head attention with the rotated key in every head."""
    attention, sequence = build(schemes.mla()), Whole.rows(1, 9)
    x = torch.randn(1, 9, WIDTH, dtype=torch.float64)
    query, state = attention.compress(x, sequence)
    k, v = attention.expand(state["latent"])
    assert k.shape == (1, 9, 3, 10)
    assert v.shape == (1, 9, 3, 5)
    q = torch.cat(query, -1)
    scores = torch.einsum("bshd,bthd->bhst", q, k) * 10**-0.5
    scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf)
    out = torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v)
    torch.testing.assert_close(run(attention, x, sequence), attention.output(out.flatten(-2)))


def test_gqa_heads_are_repeated_kv_heads() -> None:
    attention, sequence = build(schemes.gqa(rope=None, window=4)), Whole.rows(2, 9)
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    q = attention.query(x).view(2, 9, 4, 6)
    k, v = (projection(x).view(2, 9, 2, 6).repeat_interleave(2, 2) for projection in (attention.key, attention.value))
    scores = torch.einsum("bshd,bthd->bhst", q, k) / math.sqrt(6)
    near = torch.ones(9, 9).tril().bool() & torch.ones(9, 9).triu(-3).bool()
    out = torch.einsum("bhst,bthd->bshd", scores.masked_fill(~near, -math.inf).softmax(-1), v)
    torch.testing.assert_close(run(attention, x, sequence), attention.output(out.flatten(-2)))


@pytest.mark.parametrize("core", [plain.core])
def test_a_decode_step_of_mla_holds_no_heads_of_the_past(core: Any) -> None:
    """Neither keys nor values of each head, in any layout; a prefill of many tokens does expand them."""
    model = Row((layer(schemes.mla()),)).model_in(torch.float32)
    model.attentions()[0].core = core
    cache = Cache(model, 2, 50)
    with Watch() as prefill:
        advance(model, cache, tokens(2, 49))
    with Watch() as step:
        advance(model, cache, tokens(2, 1))
    heads = {50 * 3 * 11 * 2, 50 * 3 * 10 * 2, 50 * 3 * 6 * 2, 50 * 3 * 5 * 2}
    assert heads & {math.prod(shape) for shape in prefill.shapes}
    assert not heads & {math.prod(shape) for shape in step.shapes}


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("reach", [None, 4, 5, 8])
@pytest.mark.parametrize(
    "rest",
    [
        pytest.param({"origin": -1}, id="whole blocks"),
        pytest.param({"span": 3}, id="span 3"),
        pytest.param({"span": 5, "origin": 2}, id="span 5 from 2"),
        pytest.param({"limit": 2}, id="the first two"),
        pytest.param({"origin": 1, "beyond": 1}, id="beyond 1"),
        pytest.param({"limit": 3, "span": 2, "beyond": 3}, id="the first three beyond 3"),
    ],
)
def test_entries_and_visible_pairs_are_counted(stride: int, reach: int | None, rest: dict[str, Any]) -> None:
    span = rest.get("span", stride + 1)
    slot = Slot("counted", (), stride=stride, **{**rest, "span": span}, reach=reach)

    def ends(context: int) -> list[int]:
        return list(range(slot.origin + span - 1, context, stride))[: slot.limit]

    def count(queries: int, context: int) -> int:
        far = math.inf if reach is None else reach
        return sum(slot.beyond <= t - e < far for t in range(context - queries, context) for e in ends(context))

    for context in range(1, 20):
        assert replace(slot, reach=None).entries(context) == len(ends(context))
        for queries in (1, (context + 1) // 2, context):
            assert visible_pairs(slot, queries, context) == count(queries, context)
            places = len(range(0, context, stride))
            assert all_pairs(slot, queries, context) == queries * min(places, slot.limit or places)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        pytest.param({"kind": "tail"}, "at least 1 in a tail", id="a tail without rows"),
        pytest.param({"kind": "tail", "rows": 3, "reach": 4}, "rows alone", id="a tail that is read"),
        pytest.param({"kind": "tail", "rows": 3, "stride": 4}, "rows alone", id="a tail of blocks"),
        pytest.param({"rows": 3}, "are a tail's", id="an entry with rows"),
        pytest.param({"stride": 0}, "at least 1", id="no stride"),
        pytest.param({"span": 0}, "at least 1", id="no span"),
        pytest.param({"limit": 0}, "at least 1", id="no entries"),
        pytest.param({"chosen": 0}, "at least 1", id="none chosen"),
        pytest.param({"stride": 4, "span": 4, "origin": -4}, "origin . span is 0", id="an entry before its document"),
        pytest.param({"beyond": -1}, "beyond", id="entries after the query"),
        pytest.param({"reach": 0}, "reach", id="a window of nothing"),
        pytest.param({"reach": 4, "beyond": 4}, "exceed beyond", id="a window that ends before it begins"),
        pytest.param({"chosen": 4, "reach": 8}, "neither reach", id="chosen within a window"),
        pytest.param({"chosen": 4, "limit": 8}, "nor limit", id="chosen of the first"),
    ],
)
def test_a_slot_that_cannot_be_is_refused(sizes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^slot 'kv': .*{words}"):
        Slot("kv", (), **sizes)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        pytest.param(schemes.gqa(heads=5), "multiple of kv_heads", id="heads over kv_heads"),
        pytest.param(schemes.gqa(kv_heads=0), "positive", id="no kv_heads"),
        pytest.param(schemes.gqa(heads=0), "positive", id="no heads"),
        pytest.param(schemes.gqa(head_dim=0), "positive", id="no head_dim"),
        pytest.param(schemes.gqa(head_dim=5), "even", id="odd head_dim"),
        pytest.param(schemes.gqa(window=0), "window", id="no window"),
        pytest.param(schemes.gqa(rate=4), "rate", id="a key of another scheme"),
        pytest.param(schemes.mla(rope_dim=3), "rope_dim", id="odd rope_dim"),
        pytest.param(schemes.mla(latent=0), "latent", id="no latent"),
        pytest.param(schemes.mla(query_latent=0), "query_latent", id="no query_latent"),
        pytest.param(schemes.hca(output={"groups": 3, "rank": 5}), "multiple of output.groups", id="heads over groups"),
        pytest.param(schemes.hca(rope_dim=8), "rope_dim", id="rope_dim beyond the head"),
        pytest.param(schemes.hca(rate=1), "rate", id="a block of one token"),
        pytest.param(schemes.hca(window=0), "window", id="a window of nothing"),
        pytest.param(schemes.hca(head_dim=-2), "positive", id="negative head_dim"),
        pytest.param({"scheme": "gqq"}, "gqa", id="misspelt scheme"),
        pytest.param({}, "needs a scheme", id="no scheme"),
    ],
)
def test_an_impossible_scheme_is_refused(plan: schemes.Plan, words: str) -> None:
    with pytest.raises(schema.Refused, match=words):
        mechanism.config_of("attention", plan, "model.layers[0].of[0].attention")


def test_the_menu_is_the_folder() -> None:
    assert {"gqa", "hca", "mla"} <= set(mechanism.available("attention"))
    configs = [mechanism.config_of("attention", plan, "row") for plan in (schemes.gqa(), schemes.hca(), schemes.mla())]
    assert [type(config) for config in configs] == [gqa.Config, hca.Config, mla.Config]


def test_generation_is_greedy_and_goes_through_the_cache() -> None:
    model = Row((layer(schemes.hca()), layer(schemes.gqa(window=3)))).model_in(torch.float64)
    prompt = tokens(1, 7)[0]
    text = list(generate(model, prompt, 9))
    ids = prompt
    with torch.no_grad():
        for token in text:
            logits = model(ids[None], Whole.rows(1, len(ids)))
            assert token == int(logits[0, -1].argmax())
            ids = torch.cat((ids, torch.tensor([token])))
    assert len(text) == 9
    assert list(generate(model, prompt, 9, stop=text[4])) == text[: text.index(text[4])]
    drawn = [list(generate(model, prompt, 9, temperature=3.0, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_full_cache_refuses_more() -> None:
    model = Row((layer(schemes.gqa()),)).model_in(torch.float64)
    cache = Cache(model, 2, 6)
    advance(model, cache, tokens(2, 5), torch.tensor([5, 2]))
    with pytest.raises(ValueError, match="6 tokens a row"):
        advance(model, cache, tokens(2, 2), torch.tensor([2, 1]))
    assert cache.length.tolist() == [5, 2]
    advance(model, cache, tokens(2, 2), torch.tensor([1, 2]))
