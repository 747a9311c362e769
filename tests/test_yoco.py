"""A writer that stands alone, as in YOCO (arXiv 2405.05254): what it costs, what it equals, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conf import schema
from conf.schema import Refused
from models import catalog, cost
from models.cache import Cache
from models.config import ModelConfig, resolve
from models.contract import all_pairs
from models.decode import advance
from models.model import Model
from models.sequence import Whole
from tests import test_properties as properties
from tests.schemes import (
    MHC,
    Plan,
    Row,
    cca,
    csa,
    dsa,
    gla,
    gqa,
    gta,
    hca,
    layer,
    mla,
    per_head_latent,
    swa,
    tied_kv,
    tokens,
    tpa,
)

YOCO = Row((layer(gqa(window=5)), layer(gqa(window=5)), layer(gqa(), reads="alone"), layer(gqa(), reads=2)))


def test_the_cache_is_one_layer_and_the_windows_of_the_first_half() -> None:
    """By hand, bf16: K and V of 2 heads of 32 numbers are 256 bytes a token; windows of 32 tokens in two layers."""
    config = schema.build(ModelConfig, catalog.section("yoco_tiny", {}), "model")
    for context in (100, 4096):
        bytes_of = cost.kv_bytes(cost.meta(config), context)
        assert bytes_of == {
            "entries": 256 * context,
            "windows": 2 * 256 * 32,
            "tails": 0,
            "total": 256 * context + 16_384,
        }
    by_part = cost.parameters_by_part(cost.meta(config))
    # 4 layers of query, output and norms; 2 + 1 of key, value and the keys' norm
    assert by_part["attention"] == 4 * (2 * 128 * 128 + 32) + 3 * (2 * 64 * 128 + 32)
    # both layers of the second half read it
    assert cost.read_bytes_per_step(cost.meta(config), 4096) == 2 * 256 * 4096 + 2 * 256 * 32


def test_a_prefill_needs_the_first_half_alone() -> None:
    """Its blocks and the writer fill the cache, for what they declare: no query of the second half, no quadratic
    attention."""
    model, length, half = YOCO.model_in(torch.float64), 24, 2
    ids = tokens(2, length)
    whole, filled = Cache(model, 2, length), Cache(model, 2, length)
    advance(model, whole, ids)
    sequence = filled.extend(torch.full((2,), length), length)
    reader = model.attention_sublayers()[half]
    assert reader.alone is not None
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        stream = model.enter(ids, sequence)
        for depth, block in enumerate(model.depths()[:half]):
            stream, _ = block(stream, sequence.at(depth))
        state = reader.alone(reader.residual.read(stream.residual)[0], sequence.at(half))
        sequence.at(half).collect(reader.attention.slots(), state)
    for name, value in whole.state_dict().items():
        assert torch.equal(filled.state_dict()[name], value), name
    declared = model.writers()[0].flops(length, length, all_pairs).total
    declared += sum(feedforward.flops() * length for feedforward in model.feedforwards()[:half])
    own: list[Any] = list(model.attentions()[:half])
    for attention in own:
        # a chunk is read beside the ring as it was before
        projections = attention.flops(length, length, lambda *_: 0.0).total
        declared += projections + 4 * attention.config.heads * attention.config.head_dim * length * (length + 5)
    assert counter.get_total_flops() == 2 * declared


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(gqa(qk_norm=True, bias=True), id="gqa"),
        pytest.param(tied_kv(), id="tied_kv"),
        pytest.param(mla(), id="mla"),
        pytest.param(gla(query_latent=7), id="gla"),
        pytest.param(gta(), id="gta"),
        pytest.param(tpa(), id="tpa"),
        pytest.param(per_head_latent(), id="per-head latent"),
        pytest.param(swa(), id="swa"),
        pytest.param(hca(), id="hca"),
    ],
)
def test_with_the_norm_and_projections_of_its_reader_it_is_cross_layer_attention(plan: Plan) -> None:
    def of(reads: str | None) -> Model:
        return Row((layer(gqa(window=5)), layer(plan, reads=reads), layer(plan, reads=1))).model_in(torch.float64)

    shared, alone = of(None), of("alone")
    weights, sublayer = shared.state_dict(), "blocks.1.attention"
    moved = {}
    for name in alone.state_dict():
        known = name.replace(f"{sublayer}.alone.scheme", f"{sublayer}.attention")
        moved[name] = weights.pop(known.replace(f"{sublayer}.alone.norm", f"{sublayer}.norm"), None)
        if moved[name] is None:  # the norm is there twice
            moved[name] = shared.state_dict()[f"{sublayer}.norm.gain"]
    assert not weights
    alone.load_state_dict(moved)
    ids, sequence = tokens(2, 13), Whole.rows(2, 13)
    torch.testing.assert_close(alone(ids, sequence), shared(ids, sequence), rtol=0, atol=0)
    assert cost.flops(alone, 13, 13) == cost.flops(shared, 13, 13)
    assert cost.kv_bytes(alone, 13) == cost.kv_bytes(shared, 13)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        pytest.param((layer(cca(), reads="alone"),), "the state of cca is bound", id="cca"),
        pytest.param((layer(dsa(), reads="alone"),), "choose another scheme", id="dsa"),
        pytest.param((layer(csa(), reads="alone"),), "choose another scheme", id="csa"),
        pytest.param(
            (layer(gqa(), reads=1), layer(gqa(), reads="alone")),
            "layer 0 can only read a layer before it",
            id="a reader before its writer",
        ),
        pytest.param(
            (layer(gqa(), reads="alone"), layer(gqa(), reads=0), layer(gqa(), reads=-1)),
            "name layer 0",
            id="a reader of a reader",
        ),
        pytest.param((layer(mla(), reads="alone"), layer(gqa(), reads=0)), "another", id="another scheme"),
        pytest.param((layer(gqa(), reads="alon"),), "reads is 'alon'", id="misspelt"),
        pytest.param(
            (layer(tied_kv(window=3), reads="alone"), layer(tied_kv(), reads=0)),
            "shorter window",
            id="a shorter window",
        ),
    ],
)
def test_a_writer_that_cannot_be_is_refused(layers: tuple[Plan, ...], words: str) -> None:
    with pytest.raises(Refused, match=words):
        Model(Row(layers).config())


def test_what_stands_alone_has_no_query() -> None:
    model: Any = Model(YOCO.config())
    assert [name for name, _ in model.blocks[2].attention.alone.named_parameters()] == [
        "norm.gain",
        "scheme.key.weight",
        "scheme.value.weight",
    ]
    assert [layer.alone for layer in resolve(YOCO.config())] == [False, False, True, False]


def test_it_reads_a_residual_of_several_streams_as_its_attention_does() -> None:
    row = Row((layer(gqa(), reads="alone"), layer(gqa(), reads=0)), MHC)
    properties.test_cached_is_full(row)
    properties.test_initialised_and_trained(row)
    properties.test_recomputed_is_kept(row)
