"""Layer plans drawn at random from all schemes train, decode, are saved and cost what they declare.

`pytest tests/test_mixed_plans.py --plans 500` tries so many. The number of a plan is in its id and makes it again.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import torch

from conf.schema import Refused
from models import cost
from models.model import Model
from models.sequence import Whole
from tests import test_properties as properties
from tests.plans import ATTENTIONS, FEEDFORWARDS, described, draw, readers
from tests.schemes import Plan, Row, cca, csa, depth_moe, dsa, gqa, hca, layer, swa, tokens


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "row" in metafunc.fixturenames:
        rows = [draw(number) for number in range(metafunc.config.getoption("plans"))]
        ids = [f"{number} {described(row)}" for number, row in enumerate(rows)]
        metafunc.parametrize("row", rows, ids=ids)


def test_trains(row: Row) -> None:
    """Every parameter has a gradient, and no document or later token has a part in it."""
    properties.test_initialised_and_trained(row)
    properties.test_packed_is_separate(row)
    properties.test_causal(row)


def test_decodes(row: Row) -> None:
    """In ragged chunks and token by token, from a cache that is saved and restored between them."""
    properties.test_cached_is_full(row)


def test_is_saved(row: Row) -> None:
    """What the state dict holds is all that a model is."""
    model = row.model_in(torch.float64)
    other = Model(row.config(), torch.float64).double()
    other.initialise(seed=5)
    missing = other.load_state_dict(model.state_dict())
    assert not missing.missing_keys and not missing.unexpected_keys
    ids, sequence = tokens(2, row.lengths()[-1]), Whole.rows(2, row.lengths()[-1])
    with torch.no_grad():
        assert torch.equal(other(ids, sequence), model(ids, sequence))


def test_costs_what_it_declares(row: Row) -> None:
    properties.test_declared_bytes_are_measured(row)
    properties.test_declared_flops_are_measured(row)
    properties.test_declared_parameters_are_measured(row)


Broken = list[Plan]


# Each takes the layers of a plan and puts one into it that cannot be.


def before_its_writer(by: random.Random, layers: Broken) -> None:
    depth = by.randrange(len(layers))
    layers[depth] = {**layers[depth], "reads": by.choice((*range(depth, len(layers) + 2), -depth - 1))}


def a_reader(by: random.Random, layers: Broken) -> None:
    writer = len(layers)
    layers += [layer(gqa()), layer(gqa(), reads=writer), layer(gqa(), reads=writer + 1)]


def another_scheme(by: random.Random, layers: Broken) -> None:
    scheme = layers[0]["attention"]["scheme"]
    layers.append(layer(by.choice([plan for plan in ATTENTIONS if plan["scheme"] != scheme]), reads=0))


def other_sizes(by: random.Random, layers: Broken) -> None:
    writer = by.choice([plan for plan in ATTENTIONS if readers(plan) and unserved(plan)])
    layers += [layer(writer), layer(by.choice(unserved(writer)), reads=-1)]


def unserved(writer: Plan) -> list[Plan]:
    served = readers(writer)
    return [plan for plan in ATTENTIONS if plan["scheme"] == writer["scheme"] and plan not in served]


def a_longer_window(by: random.Random, layers: Broken) -> None:
    window = by.randint(1, 9)
    layers += [layer(gqa(window=window)), layer(gqa(window=by.choice((window + 1, None))), reads=-1)]


def instead(*plans: Plan) -> Callable[[random.Random, Broken], None]:
    """One of these stands in the place of a layer."""

    def change(by: random.Random, layers: Broken) -> None:
        layers[by.randrange(len(layers))] = by.choice(plans)

    return change


def without(plan: Plan, key: str) -> Plan:
    return {name: value for name, value in plan.items() if name != key}


def choosing(top_k: int) -> Plan:
    plan = next(plan for plan in FEEDFORWARDS if "top_k" in plan and plan["scheme"] == "moe")
    return layer(gqa(), {**plan, "top_k": top_k})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        pytest.param(before_its_writer, r"of\[\d\]\.reads .* only read a layer before it", id="before its writer"),
        pytest.param(a_reader, r"layer \d, which writes no state; name layer \d", id="a reader of a reader"),
        pytest.param(another_scheme, "layer 0, whose attention scheme is another", id="a reader of another scheme"),
        pytest.param(
            lambda by, layers: layers.extend((layer(cca()), layer(cca(), reads=-1))),
            r"layer \d cannot be: cca mixes .* so it cannot read another layer's state",
            id="a reader of what nobody else can read",
        ),
        pytest.param(other_sizes, "whose state has other sizes or a shorter window", id="a reader of other sizes"),
        pytest.param(a_longer_window, "whose state has other sizes or a shorter window", id="a longer window"),
        pytest.param(
            instead(*(layer(without(plan, "window")) for plan in (swa(), hca(), csa()))),
            r"of\[\d\]\.attention.*window",
            id="a window type without a window",
        ),
        pytest.param(
            instead(*(layer({**plan, "window": 0}) for plan in (gqa(), swa(), hca(), csa()))),
            r"window \(0\) must be at least 1",
            id="a window of nothing",
        ),
        pytest.param(
            instead(layer(csa(top_k=0)), layer(dsa(top_k=0))), r"indexer.* top_k must be positive", id="top 0 of blocks"
        ),
        pytest.param(
            instead(choosing(0), choosing(99)), r"top_k \(\d+\) must lie between 1 and experts", id="top 0 of experts"
        ),
        pytest.param(
            lambda by, layers: layers.__setitem__(slice(None), [layer(gqa(), depth_moe())]),
            "a layer reads 'router state', which no layer before it provides",
            id="a router that hears nobody",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(
    change: Callable[[random.Random, Broken], None], sentence: str
) -> None:
    for number in range(20):
        layers, model = [copy.copy(plan) for plan in draw(number).layers], draw(number).model
        change(random.Random(number), layers)
        with pytest.raises(Refused, match=f"^model.layers.*{sentence}[^\n]*[.]$"):
            cost.meta(Row(tuple(layers), model).config())
