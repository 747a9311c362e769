"""Configurations: every shipped one is whole, the order of precedence holds, and every mistake has one sentence."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from conf import compose as composing
from conf.compose import choices, compose, groups
from conf.schema import Refused, at_least, build
from models import catalog, cost
from models.config import resolve
from models.model import Model
from models.parameter import named_specs
from tests import runs
from train.config import read
from train.optimizer import read as read_optimizer
from train.phases import stretches

BACKBONES = [name for name in choices("model") if name.startswith("backbone")]
CASES = [
    *(pytest.param([f"model={name}"], id=f"model {name}") for name in choices("model")),
    *(
        pytest.param([f"model={model}", f"attention={attention}"], id=f"{model} with {attention}")
        for model, attention in product(BACKBONES, choices("attention"))
    ),
    *(pytest.param([f"experiment={name}"], id=f"experiment {name}") for name in choices("experiment")),
    *(
        pytest.param([f"{group}={name}"], id=f"{group} {name}")
        for group in groups()
        if group not in ("model", "attention", "experiment")
        for name in choices(group)
    ),
]


@pytest.mark.parametrize("overrides", CASES)
def test_every_shipped_configuration_composes_and_builds(overrides: list[str]) -> None:
    config = read(compose(overrides))
    stretches(config.train, read_optimizer(config.optimizer).learning_rate)
    with torch.device("meta"):
        model = Model(config.model)
    assert len(model.blocks) == len(resolve(config.model))
    assert all(parameter.is_meta for _, parameter, _ in named_specs(model))


def test_the_arms_of_the_comparison_at_a_billion_have_as_many_parameters() -> None:
    """Within a percent of grouped-query attention's, all and those that a token is multiplied by."""
    arms = [read(compose(["experiment=1b", f"attention={name}_1b"])) for name in ("gqa", "mla", "hca")]
    sizes = [cost.parameters(cost.meta(arm.model)) for arm in arms]
    assert 0.9e9 < sizes[0].total < 1.1e9
    for size in sizes:
        assert size.total == pytest.approx(sizes[0].total, rel=0.01)
        assert size.active == pytest.approx(sizes[0].active, rel=0.01)


def test_the_groups_that_a_run_is_made_of_are_there() -> None:
    needed = {"attention", "data", "experiment", "model", "moe", "optimizer", "parallel", "residual", "schedule"}
    assert needed <= set(groups())


def test_an_experiment_overrides_a_group_and_the_command_line_both() -> None:
    default = compose([])
    smoke = compose(["experiment=smoke"])
    assert default["model"]["layers"][0]["of"][0]["attention"]["scheme"] == "gqa"
    assert smoke["model"]["layers"][0]["of"][0]["attention"]["scheme"] == "mla"
    assert smoke["train"]["steps"] != default["train"]["steps"]
    for overrides in (["experiment=smoke", "train.steps=7"], ["train.steps=7", "experiment=smoke"]):
        assert compose(overrides)["train"]["steps"] == 7
    assert compose(["attention=hca", "attention=mla"]) == compose(["attention=mla"]), "the last counts"
    assert compose(["+attention=mla"]) == compose(["attention=mla"]), "a plus is no mistake, as for other keys"
    assert compose(["experiment=smoke", "attention=gqa"])["model"]["layers"][0]["of"][0]["attention"]["scheme"] == "gqa"


def test_building_material_is_no_section_of_a_run() -> None:
    assert not {"attention", "moe", "residual"} & compose([]).keys()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        pytest.param("3e-4", 3e-4, id="a number that YAML reads as text"),
        pytest.param("1", 1.0, id="a whole number for a number"),
    ],
)
def test_numbers(text: str, value: float) -> None:
    assert read_optimizer(read(compose([f"optimizer.learning_rate={text}"])).optimizer).learning_rate == value


@dataclasses.dataclass
class Inner:
    size: int = 1


@dataclasses.dataclass
class Outer:
    inner: Inner
    name: str = ""
    rate: float = 1.0
    flag: bool = False
    kind: Literal["a", "b"] = "a"
    maybe: int | None = None
    items: list[Inner] = dataclasses.field(default_factory=list)
    pair: tuple[int, int] = (1, 2)
    table: dict[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        at_least(0, self, "rate")


def test_a_mapping_is_read_whole() -> None:
    values = {
        "inner": {"size": 2},
        "rate": 3,
        "maybe": None,
        "items": [{"size": 4}],
        "pair": [5, 6],
        "table": {"x": 7},
    }
    expected = Outer(Inner(2), rate=3.0, items=[Inner(4)], pair=(5, 6), table={"x": 7})
    assert build(Outer, values, "outer") == expected


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        pytest.param({"nmae": "x"}, "outer.nmae is not a key that anything reads; did you mean 'name'?", id="misspelt"),
        pytest.param({"inner": {"sizes": 1}}, "outer.inner.sizes is not a key", id="misspelt deeper"),
        pytest.param({"inner": 3}, "outer.inner is 3 (int), but a mapping of keys is needed.", id="no mapping"),
        pytest.param({"inner": None}, "outer.inner is None", id="null for a mapping"),
        pytest.param({"rate": "fast"}, "outer.rate is 'fast' (str), but a number is needed.", id="text for a number"),
        pytest.param({"rate": True}, "outer.rate is True (bool), but a number is needed.", id="truth for a number"),
        pytest.param({"rate": -1}, "outer: rate (-1.0) must be at least 0.", id="out of range"),
        pytest.param({"rate": float("nan")}, "outer.rate is nan, but a finite number is needed.", id="not a number"),
        pytest.param({"rate": "-1e400"}, "outer.rate is -inf, but a finite number is needed.", id="an infinite number"),
        pytest.param({"inner": {"size": True}}, "outer.inner.size is True", id="truth for a count"),
        pytest.param({"flag": 1}, "outer.flag is 1 (int), but true or false is needed.", id="number for truth"),
        pytest.param({"flag": "true"}, "outer.flag is 'true' (str), but true or false is needed.", id="text for truth"),
        pytest.param({"kind": "c"}, "outer.kind is 'c' (str), which does not exist", id="no such choice"),
        pytest.param({"kind": ["a"]}, "outer.kind is ['a'] (list), which does not exist", id="a list for a choice"),
        pytest.param({"maybe": "x"}, "outer.maybe is 'x' (str), but a whole number is needed.", id="text for a maybe"),
        pytest.param({"items": "x"}, "outer.items is 'x' (str), but a list is needed.", id="text for a list"),
        pytest.param({"items": [{"sise": 1}]}, "outer.items[0].sise is not a key", id="misspelt in a list"),
        pytest.param({"pair": [1]}, "outer.pair has 1 items, but 2 are needed.", id="half a pair"),
        pytest.param({"table": {"x": "y"}}, "outer.table.x is 'y'", id="text in a table of numbers"),
    ],
)
def test_a_mistake_has_one_sentence(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Refused) as refusal:
        build(Outer, {"inner": {}} | change, "outer")
    assert sentence in str(refusal.value)
    assert str(refusal.value)[-1] in ".?"


def test_a_missing_key_is_told() -> None:
    with pytest.raises(Refused, match=r"^outer.inner is missing; a mapping of keys is needed\.$"):
        build(Outer, {}, "outer")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        pytest.param(["model=none"], "model is 'none'", id="no such model"),
        pytest.param(["model=null"], "model is None.* there is: backbone", id="null for a model"),
        pytest.param(["optimizer=3"], "optimizer is 3.* there is: adamw, muon", id="a number for an optimizer"),
        pytest.param(["schedule=[]"], "schedule is .* there is: cosine", id="no name for a schedule"),
        pytest.param(["experiment=[smoke,smok]"], "did you mean 'smoke'", id="one misspelt of two"),
        pytest.param(["--foo"], "'--foo'; write it as key=value", id="an option that there is not"),
        pytest.param(["~run"], "run is missing; a mapping of keys is needed", id="a section of texts deleted"),
        pytest.param(["residual.x=3"], "model.residual.x is not a key", id="a key that the residual has not"),
        pytest.param(["+extra.key=1"], "extra is not a key that anything reads", id="a section that nobody reads"),
        pytest.param(["a=b=c"], "cannot be read|cannot be composed", id="two equals signs"),
        pytest.param(["~train"], "train.seed' not found", id="a section deleted"),
        pytest.param(["~nothing"], "nothing", id="nothing deleted"),
        pytest.param(["~model"], "model is missing; a mapping of keys is needed", id="the model deleted"),
        pytest.param(["~=3"], "~=3 is not read", id="a deletion without a key"),
        pytest.param(["cluster=cpu"], "no group 'cluster' here; there is: attention", id="a group of another command"),
        pytest.param(["hydra/launcher=x"], "run.dir names a run's directory", id="a group of Hydra's own"),
        pytest.param(["train.steps=1,2"], "train.steps=1,2 gives several values", id="a sweep"),
        pytest.param(["model.layers=[]"], "layers must not be empty", id="no layers"),
        pytest.param(["model.layers=[{of: []}]"], "must hold at least one layer", id="an empty stack"),
        pytest.param(
            ["model.layers=[{of: [{attention: {scheme: gqaa}, feedforward: ${moe}}]}]"], "gqa", id="no such scheme"
        ),
        pytest.param(["optimizer.name=sgd"], "name is 'sgd'.* there is: adamw, muon", id="no such optimizer"),
        pytest.param(["data.train.source=corpse"], "corpse", id="no such source"),
        pytest.param(["engine=titan"], "engine is 'titan'", id="no such engine"),
        pytest.param(["hydra.run.dir=x"], "hydra", id="Hydra's own settings"),
        pytest.param(["train.phases=3"], "train.phases is 3", id="a number for phases"),
        pytest.param(["train.mtp_weight=0.1"], "model.mtp, which is null", id="a weight of nothing"),
        pytest.param(["train.phases=[{start: 2, mtp_weight: 1}]"], "model.mtp", id="a weight of nothing in a phase"),
        pytest.param(["model=deepseek_v3_tiny", "train.mtp_weight=-1"], r"mtp_weight \(-1", id="a weight below 0"),
        pytest.param(["+model.mtp={scheme: concat, layer: {attention: {scheme: gqaa}}}"], "feedforward", id="half"),
    ],
)
def test_compositions_that_are_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(Refused, match=sentence) as refusal:
        read(compose(overrides))
    assert "\n" not in str(refusal.value)
    assert str(refusal.value)[-1] in ".?"


@pytest.mark.parametrize("text", ["runs/a-1", "a b", "ü/日本", "it's", "a\\", "a\\'b", "a\\\\'", "a=b,c", "~/x", " "])
def test_a_text_is_typed_so_that_it_is_read_back(text: str) -> None:
    assert compose(composing.overrides({"run.dir": text}))["run"]["dir"] == text


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        pytest.param(["model.std=nan"], "model.std", id="initial matrices of no number"),
        pytest.param(["model.norm_eps=-1"], "norm_eps", id="a norm that may divide by nothing"),
        pytest.param(["optimizer.learning_rate=inf"], "optimizer.learning_rate", id="an infinite learning rate"),
        pytest.param(["train.phases=[{start: 3, learning_rate: inf}]"], "learning_rate", id="one in a phase"),
        pytest.param(["moe.router.scaling=nan"], "router.scaling", id="weights of experts of no number"),
        pytest.param(["moe.router.scaling=-1"], "scaling", id="weights of experts below 0"),
        pytest.param(["moe.balance_loss=-1"], "balance_loss", id="a reward for imbalance"),
        pytest.param(["moe.bias_rate=-1"], "bias_rate", id="a bias to the loaded"),
        pytest.param(["attention=mla", "+attention.latent_eps=-1"], "latent_eps", id="a norm of latents"),
        pytest.param(["residual=mhc", "residual.norm_eps=-1"], "norm_eps", id="a norm of streams"),
    ],
)
def test_an_impossible_number_is_refused_by_its_key(overrides: list[str], key: str) -> None:
    with pytest.raises(Refused, match=rf"{key} .*(finite number is needed|must be at least 0)\.$"):
        read(compose(overrides))


@pytest.mark.parametrize(
    "read_it",
    [
        pytest.param(lambda: compose(["attention=odd"]), id="by a run"),
        pytest.param(lambda: catalog.section("backbone_tiny", {"attention": "odd"}), id="by what weighs models"),
    ],
)
def test_a_broken_file_is_named_with_its_line(
    read_it: Callable[[], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(composing.ROOT, tmp_path / "conf")
    (tmp_path / "conf/attention/odd.yaml").write_text("x: 1\ny: [2\nz: 3\n")
    monkeypatch.setattr(composing, "ROOT", tmp_path / "conf")
    monkeypatch.setattr(catalog, "CONF", tmp_path / "conf")
    with pytest.raises(Refused, match=r"/attention/odd\.yaml cannot be read \(line 3: [^\n]+\); it must be YAML\.$"):
        read_it()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        pytest.param("3", "Invalid loaded object type: int", id="a number"),
        pytest.param("defaults: 3", "defaults must be a list", id="a number for defaults"),
        pytest.param("defaults: [null]", "Unsupported type in defaults", id="nothing among defaults"),
        pytest.param("defaults: [odd]", "recursion", id="itself among defaults"),
        pytest.param("null: 3", "Incompatible key type 'NoneType'", id="a key that is none"),
        pytest.param("train: {steps: '${'}", "no viable alternative", id="half a reference"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(
    text: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(composing.ROOT, tmp_path / "conf")
    (tmp_path / "conf/experiment/odd.yaml").write_text(f"# @package _global_\n{text}\n")
    monkeypatch.setattr(composing, "ROOT", tmp_path / "conf")
    with pytest.raises(Refused, match=rf"^the configuration cannot be composed: [^\n]*{why}[^\n]*\.$"):
        compose(["experiment=odd"])


def test_the_tiny_run_of_the_tests_is_read_whole() -> None:
    assert len(resolve(read(compose(runs.TINY)).model)) == 2
