"""A run on several sources: exact across a change of their weights, whenever it was interrupted."""

from __future__ import annotations

import io
import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.checkpoint import MANIFEST, Manifest
from models.commands.codec import codec_of
from tests import runs
from tests.corpora import write_corpus
from tests.runs import TINY
from train.checkpoint.files import write_hashed
from train.checkpoint.store import PLAIN_FILE

STEPS = 12
# a border at a checkpoint, one between two, and one where the length changes with the weights
PHASES = (
    "train.phases=[{start: 4, mixture: {code: 1, books: 2, pairs: 1}},"
    "{start: 6, sequence_length: 16, mixture: {code: 0, books: 0.3, pairs: 0.7}}, {start: 9, batch_tokens: 128}]"
)
BASE = [
    *(override for override in TINY if not override.startswith("data.")),
    "~data.train", "~data.validation",
    "+data.train={code: {source: corpus, path: code, weight: 0.6}, books: {source: corpus, path: books, weight: 0.3},"
    "pairs: {source: recall, num_pairs: 2, num_queries: 2, num_keys: 30, num_values: 30, weight: 0.1}}",
    "+data.validation={pairs: {source: recall, num_pairs: 2, num_queries: 2, num_keys: 30, num_values: 30,"
    "grid: {length: [8, 24]}}, code: {source: corpus, path: code}}",
    f"train.steps={STEPS}", "checkpoint.keep=9", "checkpoint.every=2", "run.dir=run", PHASES,
]  # fmt: skip


def write_texts(folder: Path) -> None:
    for name in ("code", "books"):
        draw = random.Random(name)
        documents = [[*(draw.randrange(63) for _ in range(draw.randrange(3, 60))), 63] for _ in range(20)]
        write_corpus(folder / name, documents, vocab=64)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an uninterrupted run; its corpora lie beside it."""
    folder = tmp_path_factory.mktemp("reference")
    write_texts(folder)
    runs.train(folder, BASE)
    return folder / "run"


def goes_on_from(reference: Path, folder: Path, step: int, ranks: int = 1) -> Path:
    """The run as it would have been found after a crash with its newest checkpoint at `step`, resumed."""
    shutil.copytree(reference.parent, folder, dirs_exist_ok=True)
    for name in runs.saved(folder / "run"):
        if int(name.removeprefix("step_")) > step:
            shutil.rmtree(folder / "run/checkpoints" / name)
    assert f"resumed from step {step}" in runs.train(folder, BASE, ranks)
    return folder / "run"


def sources(run: Path) -> list[dict[str, int]]:
    return [record["sources"] for record in runs.records(run)]


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(2, id="before every border"),
        pytest.param(4, id="at the first border"),
        pytest.param(8, id="behind a new length"),
    ],
)
def test_a_resume_across_a_change_of_the_mixture_is_exact(reference: Path, tmp_path: Path, step: int) -> None:
    run = goes_on_from(reference, tmp_path, step)
    assert runs.course(run) == runs.course(reference)
    assert sources(run) == sources(reference)
    assert runs.records(run, "val_sources") == runs.records(reference, "val_sources")
    runs.assert_same_state(runs.state(run, STEPS), runs.state(reference, STEPS))


def test_another_number_of_ranks_reads_the_same_mixture(reference: Path, tmp_path: Path) -> None:
    run = goes_on_from(reference, tmp_path, 2, ranks=2)
    assert sources(run) == sources(reference)
    pairs = list(zip(runs.records(run), runs.records(reference), strict=True))
    assert [one["batch"] for one, _ in pairs] == [other["batch"] for _, other in pairs]
    assert max(abs(one["loss"] - other["loss"]) for one, other in pairs) < 1e-5


def test_lines_say_what_was_consumed_and_measured(reference: Path) -> None:
    """Eight windows a step, then four, then eight; the weights are those of the configuration and the phases."""
    rows = [8] * 6 + [4] * 3 + [8] * 3
    weights = [{"code": 0.6, "books": 0.3, "pairs": 0.1}] * 4
    weights += [{"code": 0.25, "books": 0.5, "pairs": 0.25}] * 2 + [{"code": 0.0, "books": 0.3, "pairs": 0.7}] * 6
    due = dict.fromkeys(weights[0], 0.0)
    for number, shares, found in zip(rows, weights, sources(reference), strict=True):
        due = {name: due[name] + number * shares[name] for name in due}
        assert sum(found.values()) == round(sum(due.values()))
        assert max(abs(found[name] - due[name]) for name in due) <= 0.75 + 1e-9, "of a window, whatever its length"
    assert sources(reference)[5]["code"] == sources(reference)[-1]["code"], "a weight of 0 is a pause"

    for record in runs.records(reference, "val_sources"):
        measured = record["val_sources"]
        assert list(measured) == ["pairs/length=8", "pairs/length=24", "code"]
        assert [record[f"val_{key}"] for key in ("loss", "accuracy", "bpb")] == [
            measured["code"][key] for key in ("loss", "accuracy", "bpb")
        ]
        assert [line["facts"].get("length") for line in measured.values()] == [8, 24, None]
        assert measured["pairs/length=24"]["tokens"] == 4 * 2, "two answers in each of four windows"
        assert "bpb" not in measured["pairs/length=8"]
    printed = (reference / "log.txt").read_text()
    assert "validation pairs/length=24  loss" in printed


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        pytest.param(
            "train.phases=[{start: 4, mixture: {cod: 1, books: 2, pairs: 1}}]",
            r"a source in train\.phases\[0\]\.mixture is 'cod' .*; did you mean 'code'",
            id="unknown source",
        ),
        pytest.param(
            "train.phases=[{start: 4, mixture: {code: 1}}]", r"leaves out books, pairs; .* 0 for none", id="not all"
        ),
        pytest.param(
            "train.phases=[{start: 4, mixture: {code: 0, books: 0, pairs: 0}}]", "no weight above 0", id="all zero"
        ),
        pytest.param(
            "train.phases=[{start: 4, mixture: {code: 1, books: 2, pairs: -1}}]", "weight -1.0", id="negative"
        ),
        pytest.param("data.train.code.weight=0.7", "train.code.weight=0.6, and now it is 0.7", id="other weights"),
        pytest.param(PHASES.replace("books: 2", "books: 3"), "mixture.books=2.0, and now it is 3.0", id="other phase"),
        pytest.param(
            "data.train.books=null", r"a source in train\.phases\[0\]\.mixture is 'books'", id="a source less"
        ),
        pytest.param("data.train.code.path=books", "hold the same data", id="the same data twice"),
    ],
)
def test_what_contradicts_the_mixture_is_refused(reference: Path, changed: str, sentence: str) -> None:
    job = runs.start(reference.parent, [*BASE, changed])
    before = runs.tree(reference)
    assert job.end() == 2
    (line,) = job.printed().splitlines()
    assert line.startswith("refused: ")
    assert re.search(sentence, line), line
    assert runs.tree(reference) == before


def test_corpora_may_have_moved_and_phases_come_after(reference: Path, tmp_path: Path) -> None:
    shutil.copytree(reference.parent, tmp_path, dirs_exist_ok=True)
    (tmp_path / "code").rename(tmp_path / "moved")
    arguments = [*BASE, "data.train.code.path=moved", "data.validation.code.path=moved", f"train.steps={STEPS + 1}"]
    arguments += [f"{PHASES[:-1]}, {{start: {STEPS}, mixture: {{code: 1, books: 0, pairs: 0}}}}]"]
    assert f"resumed from step {STEPS}" in runs.train(tmp_path, arguments)
    assert json.loads((tmp_path / "run/exit.json").read_text())["code"] == 0
    *_, before, after = sources(tmp_path / "run")
    assert after == {**before, "code": before["code"] + 8}


def test_a_checkpoint_that_does_not_say_where_its_data_stood_is_refused(reference: Path, tmp_path: Path) -> None:
    shutil.copytree(reference.parent, tmp_path, dirs_exist_ok=True)
    path = tmp_path / f"run/checkpoints/step_{STEPS:08d}"
    values = torch.load(path / PLAIN_FILE)
    del values["progress"]["data"]
    torch.save(values, packed := io.BytesIO())
    manifest = Manifest.read(path)
    for name in (PLAIN_FILE, MANIFEST):
        (path / name).unlink()
    record = write_hashed(path / PLAIN_FILE, packed.getvalue())
    changed = replace(manifest, files={**manifest.files, PLAIN_FILE: record})
    write_hashed(path / MANIFEST, changed.text().encode())
    job = runs.start(tmp_path, [*BASE, f"train.steps={STEPS + 1}"])
    assert job.end() == 2
    assert "take its weights alone with train.init in a new run.dir" in job.printed()


def test_the_text_of_a_mixture_is_spelt_by_its_corpora(reference: Path, tmp_path: Path) -> None:
    shutil.copytree(reference.parent, tmp_path, dirs_exist_ok=True)
    manifest = json.loads((tmp_path / "code/manifest.json").read_text())
    (tmp_path / "code/manifest.json").write_text(json.dumps({**manifest, "settings": {"tokenizer": "bytes"}}))
    config = (tmp_path / "run/config.yaml").read_text()
    (tmp_path / "run/config.yaml").write_text(config.replace("path: code", f"path: {tmp_path / 'code'}"))
    assert codec_of(tmp_path / "run", None, 64).encode("é") == [0xC3, 0xA9]
