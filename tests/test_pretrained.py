"""Runs that start from weights that no run made: an imported directory, and Transformers' own."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
import torch

from conf.compose import compose
from data.course import Course
from data.loader import Loader
from models.families.common.plan import difference
from models.model import Losses, Model
from models.sequence import Whole
from models.shards import WHOLE
from models.weights import export_model, load_model, open_weights, save_model
from tests import runs
from tests.corpora import write_corpus
from tests.runs import TINY
from train.config import read
from train.phases import stretches

FAMILY = [
    *(argument for argument in TINY if not argument.startswith(("attention.", "moe.", "model.layers"))),
    *("model=deepseek_v3_tiny", "train.steps=2", "evaluate.every=0"),
]
"""DeepSeek-V3 in small: tensors of one, two and three dims, a buffer, multi-token prediction."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, `theirs` as a publisher's release holds it, and `ours`, imported from it."""
    folder = tmp_path_factory.mktemp("pretrained")
    runs.write_text(folder)
    config = read(compose([*FAMILY, "run.dir=none"])).model
    model = Model(config)
    model.initialise(5)
    for buffer in model.buffers():  # which else start at zero
        buffer.normal_()
    save_model(folder / "made", config, model.state_dict())
    export_model(folder / "theirs", open_weights(folder / "made"))
    weights = open_weights(folder / "theirs")
    save_model(folder / "ours", weights.config, weights.tensors)
    return folder


@torch.no_grad()
def score(place: Path, name: str) -> float:
    """Nats a token that the model of a directory gives to the first batch of the run."""
    config = read(compose([*FAMILY, f"data.train.path={place / 'corpus'}", "run.dir=none"]))
    (stretch,) = stretches(config.train, 0.0)
    course = Course(config.data.open()[0], [stretch.leg()], config.data.seed)
    with Loader(course, sequence_length=stretch.sequence_length, seed=config.data.seed).stream(0, stretch.rows) as rows:
        batch = next(rows)
    losses = load_model(place / name)(batch.ids, Whole(batch.position, batch.document), batch.targets[0])
    assert isinstance(losses, Losses)
    return float(losses.cross_entropy / batch.count())


@pytest.mark.parametrize(("name", "ranks"), [("ours", 1), ("ours", 2), ("theirs", 2)])
def test_the_first_loss_is_what_the_model_scores(place: Path, name: str, ranks: int) -> None:
    directory = f"run_{name}_{ranks}"
    printed = runs.train(place, [*FAMILY, f"train.init={name}", f"run.dir={directory}"], ranks)
    assert f"started from the weights of {name}" in printed
    assert runs.records(place / directory)[0]["loss"] == pytest.approx(score(place, name), rel=1e-6)


def test_multi_token_prediction_is_dropped_and_starts_anew(place: Path) -> None:
    """What the model next to it scores is the same."""
    weights = open_weights(place / "ours")
    plain = {name: tensor for name, tensor in weights.tensors.items() if not name.startswith("mtp.")}
    save_model(place / "plain", dataclasses.replace(weights.config, mtp=None), plain)
    for name, change, said in (
        ("ours", ["model.mtp=null"], "ours has mtp.*, which this model is without and leaves out"),
        ("plain", [], "plain has no mtp.*, which starts as it was initialised"),
    ):
        run = f"mtp_{name}"
        printed = runs.train(place, [*FAMILY, *change, "train.steps=1", f"train.init={name}", f"run.dir={run}"])
        assert printed.count(said) == 1
        assert runs.records(place / run)[0]["loss"] == pytest.approx(score(place, name), rel=1e-6)


def test_what_shows_in_no_shape_is_told(place: Path) -> None:
    """Of an imported directory, of the run that it began, and of a checkpoint that was taken from that run."""
    run = [*FAMILY, "train.steps=1"]
    same = runs.train(place, [*run, "train.init=theirs", "run.dir=same"])
    other = runs.train(place, [*run, "train.init=theirs", "run.dir=other", "model.norm_eps=0.01"])
    further = runs.train(place, [*run, "train.init=other", "run.dir=further"])
    ahead = runs.train(place, [*run, "train.init=ours", "run.dir=ahead", "model.mtp.layer.feedforward.top_k=3"])
    shutil.copytree(place / "other/checkpoints/step_00000001", place / "away/checkpoints/step_00000001")
    alone = runs.train(place, [*run, "train.init=away/checkpoints/step_00000001", "run.dir=alone"])
    assert "of a model whose" not in same
    assert "theirs is of a model whose norm_eps is 1e-06, not 0.01 as here" in other
    assert "other/checkpoints/step_00000001 is of a model whose norm_eps is 0.01, not 1e-06 as here" in further
    assert "ours is of a model whose mtp.layer.feedforward.top_k is 4, not 3 as here" in ahead
    assert "away/checkpoints/step_00000001 was not compared with this model: " in alone


def test_ids_of_another_tokenizer_are_told(place: Path) -> None:
    write_corpus(place / "other ids", [list(range(63)) * 10], vocab=63)
    run = [*FAMILY, "train.steps=1"]
    runs.train(place, [*run, "run.dir=first"])
    same = runs.train(place, [*run, "train.init=first", "run.dir=as_first"])
    other = runs.train(place, [*run, "data.train.path=other ids", "train.init=first", "run.dir=otherwise"], ranks=2)
    told = "first/checkpoints/step_00000001 was trained on ids of another tokenizer"
    assert told not in same and other.count(told) == 1


def test_another_scheme_with_the_same_weights_is_told_by_name() -> None:
    one, other = (read(compose([f"attention={scheme}", "run.dir=none"])).model for scheme in ("gqa", "anchors"))
    assert difference(one, other) == "layer.0.attention is gqa, not anchors"


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        pytest.param("ours", ["model.vocab=80"], "embedding.weight is [64, 16] there but [80, 16]", id="a shape"),
        pytest.param("theirs", ["model.tied=true"], "head.weight is [64, 16] there but nothing here", id="a name"),
        pytest.param("cut", [], "cut/model.safetensors cannot be read", id="a file that was cut"),
    ],
)
def test_weights_that_do_not_fit_are_refused(place: Path, name: str, change: list[str], sentence: str) -> None:
    shutil.copytree(place / "ours", place / "cut", dirs_exist_ok=True)
    os.truncate(place / "cut" / WHOLE, 1000)
    job = runs.start(place, [*FAMILY, *change, f"train.init={name}", "run.dir=refused"], ranks=2)
    assert job.end() == 2
    assert sentence in job.printed() and job.printed().count("refused: ") == 1
    assert not (place / "refused").exists()
