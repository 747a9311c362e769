"""Which data a run reads, and the sentence for what cannot be read."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import conf
from conf.schema import Refused, build
from data import corpus
from data.config import DataConfig
from data.corpus import Config
from tests.corpora import write_corpus

GROUP = Path(conf.__path__[0], "data")


def composed(name: str, tmp_path: Path, *overrides: str) -> dict[str, Any]:
    (tmp_path / "root.yaml").write_text(f"defaults:\n  - data: {name}\n  - _self_\ntrain:\n  seed: 3\n")
    search = f"hydra.searchpath=[file://{GROUP.parent}]"
    with initialize_config_dir(str(tmp_path), version_base=None):
        whole = compose("root", [search, *overrides])
    return OmegaConf.to_container(whole, resolve=True)["data"]  # type: ignore[index,call-overload,return-value]


def parts(section: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The sources of a section by name; one without a name as such."""
    named = {"": section} if "source" in section else section
    return {name: dict(values) for name, values in named.items()}


@pytest.mark.parametrize("name", sorted(path.stem for path in GROUP.glob("*.yaml")))
def test_every_shipped_config_is_one(name: str, tmp_path: Path) -> None:
    config = build(DataConfig, composed(name, tmp_path), "data")
    assert config.seed == 3, "the run's seed draws the order"
    assert config.validation is not None
    trained, validated = parts(config.train), parts(config.validation)
    by_kind = {values["source"]: values for values in trained.values()}
    assert by_kind.keys() == {values["source"] for values in validated.values()}
    for name, values in validated.items():
        grid, of_training = values.pop("grid", {}), trained.get(name, by_kind[values["source"]])
        of_training.pop("weight", None)
        apart = {key for key in {*values, *of_training} if values.get(key) != of_training.get(key)}
        assert "split" in apart and values["split"] == "valid" and of_training["split"] == "train"
        assert apart <= {"split", "haystack", "num_queries", *grid}, "the two differ in what is asked of them alone"
        if "haystack" in apart:
            assert {**values["haystack"], "split": "train"} == of_training["haystack"]


@pytest.mark.parametrize(
    ("name", "vocab"),
    [
        pytest.param("recall", 1 + 64 + 64, id="recall"),
        pytest.param("needle", 64 + 64 + 64, id="needle"),
        pytest.param("tracking", 64 + 1 + 64 + 64, id="tracking"),
    ],
)
def test_a_shipped_task_and_its_null(name: str, vocab: int, tmp_path: Path) -> None:
    task, null = composed(name, tmp_path), composed(f"{name}_null", tmp_path)
    assert {**task["train"], "null_task": True} == null["train"]
    assert null["validation"]["null_task"] and not task["validation"]["null_task"]
    mixture, probes = build(DataConfig, task, "data").open()
    assert mixture.vocab == vocab
    assert all(probe.source.vocab == vocab for probe in probes.values())
    measured = [sorted(probe.facts(probe.length or 64).items()) for probe in probes.values()]
    assert all(one != other for one, other in itertools.combinations(measured, 2)), "facts tell the sources apart"


def test_the_grid_of_needles(tmp_path: Path) -> None:
    config = build(DataConfig, composed("needle", tmp_path, "data.validation.grid.length=[32]"), "data")
    assert list(config.open_validation()) == [f"needle/length=32/depth={depth}" for depth in (0, 0.5, 1)]


def test_an_override_of_the_training_path_moves_both(tmp_path: Path) -> None:
    config = build(DataConfig, composed("stdlib", tmp_path, "data.train.path=elsewhere"), "data")
    assert config.validation is not None
    assert config.train["path"] == config.validation["path"] == "elsewhere"


@pytest.mark.parametrize(
    ("train", "sentence"),
    [
        pytest.param({}, "data.train.source is missing; choose one of corpus, needle, recall", id="no-source"),
        pytest.param(
            {"source": "recal"}, "data.train.source is 'recal', .* choose one of corpus, needle, recall", id="typo"
        ),
        pytest.param({"source": "loader"}, "'loader', which is no data source", id="module-that-is-no-source"),
        pytest.param({"source": "../x"}, "which is no data source", id="path-as-source"),
        pytest.param({"source": 3}, "which is no data source", id="number-as-source"),
        pytest.param({"source": "recall", "num_pair": 3}, "did you mean 'num_pairs'", id="misspelt-key"),
        pytest.param({"source": "recall", "num_pairs": "3"}, "num_pairs is '3'", id="text-for-a-number"),
        pytest.param({"source": "recall", "num_pairs": 99}, "num_pairs ≤ num_keys", id="impossible-numbers"),
        pytest.param({"source": "corpus"}, "data.train.path is missing", id="no-path"),
        pytest.param({"source": "corpus", "path": "x", "split": "val"}, "did you mean 'valid'", id="misspelt-split"),
    ],
)
def test_bad_settings_are_refused(train: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        build(DataConfig, {"train": train}, "data")


def cut(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1])

    return damage


def flip(name: str, at: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[at] ^= 1
        (folder / name).write_bytes(content)

    return damage


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def state(key: str, value: Any) -> Callable[[Path], None]:
    """Make the manifest say something else of the training split."""

    def damage(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["splits"]["train"][key] = value
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return damage


def without_validation(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["splits"]["valid"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        pytest.param(lambda f: (f / "manifest.json").write_text("{"), "cannot be read", id="manifest-cut"),
        pytest.param(lambda f: (f / "manifest.json").write_text("[]"), "a mapping of keys is needed", id="no-mapping"),
        pytest.param(state("tokens", "many"), "tokens is 'many'", id="manifest-with-a-wrong-type"),
        pytest.param(without_validation, "splits are train, but train and valid are needed", id="a-split-less"),
        pytest.param(remove("train.bin"), "train.bin is missing", id="no-bin"),
        pytest.param(remove("train.idx"), "train.idx is missing", id="no-idx"),
        pytest.param(cut("train.bin"), r"train.bin is truncated: \d+ bytes where .* \d+", id="truncated-bin"),
        pytest.param(cut("train.idx"), "train.idx is truncated", id="truncated-idx"),
        pytest.param(flip("train.bin", 3), "is damaged", id="flipped-byte-in-bin"),
        pytest.param(flip("train.idx", 40), "is damaged", id="flipped-byte-in-idx"),
        pytest.param(lambda f: (f / "train.bin").write_bytes(b""), "truncated: 0 bytes", id="emptied-bin"),
    ],
)
def test_a_damaged_corpus_is_refused(damage: Callable[[Path], None], sentence: str, tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "corpus", [[1, 2, 3], [4, 5]], vocab=9)
    damage(folder)
    with pytest.raises(Refused, match=f"{sentence}.*; remove the corpus"):
        Config(str(folder)).open()


@pytest.mark.filterwarnings("ignore:Exception ignored.*IndexedDataset.__del__")  # Megatron's, of one half made
@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        pytest.param(flip("train.idx", 0), "is not a Megatron index", id="magic"),
        pytest.param(flip("train.idx", 17), "is not a Megatron index|does not hold what", id="token-type"),
        pytest.param(flip("train.idx", 18), "is not a Megatron index", id="number-of-sequences"),
        pytest.param(flip("train.idx", 34), "does not hold what", id="length"),
        pytest.param(flip("train.idx", 34 + 2 * 4 + 8 + 7), "does not hold what", id="place"),
        pytest.param(state("tokens", 6), "does not hold what", id="manifest-tokens"),
    ],
)
def test_a_corpus_too_large_to_hash_is_still_checked_by_its_index(
    damage: Callable[[Path], None], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "CHECKED_WHOLE", 0)
    folder = write_corpus(tmp_path / "corpus", [[1, 2, 3], [4, 5]], vocab=9)
    Config(str(folder)).open()
    damage(folder)
    with pytest.raises(Refused, match=sentence):
        Config(str(folder)).open()


@pytest.mark.parametrize("path", ["nowhere", "file", "folder", "with a space"])
def test_a_path_without_a_corpus_is_refused_with_the_command_that_makes_one(path: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(Refused, match=r"holds no prepared corpus .* make one with .python -m data prepare") as refusal:
        Config(str(tmp_path / path)).open()
    command = shlex.split(str(refusal.value).split("`")[1])
    assert command == ["python", "-m", "data", "prepare", "source=stdlib", f"out={tmp_path / path}"]


def test_an_empty_held_out_split_is_refused(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path, [[1, 2, 3]], vocab=9)
    with pytest.raises(Refused, match="empty split 'valid'"):
        Config(str(folder), "valid").open()
