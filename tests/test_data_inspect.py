"""What `inspect` says of a corpus is so, for people and for scripts."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from conf.schema import Refused
from data.__main__ import main
from data.inspect import Inspect, inspect
from data.prepare import Prepare, prepare
from data.train_tokenizer import TrainTokenizer, train_tokenizer
from tests.corpora import write_corpus

SHORT = ["one\n", "two, naïve\n", "three\x1b[31m\n", "one\n", "one\n", "two, naïve\n"]
TEXTS = [*SHORT, *(f"{i} text\n" * i for i in range(1, 60))]


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def corpus(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in [*TEXTS, " "]))
    tokenizer = "bytes"
    if request.param == "bpe":
        tokenizer = str(folder / "bpe.json")
        train_tokenizer(TrainTokenizer(str(folder / "a.jsonl"), tokenizer, vocab=300))
    out = folder / "out"
    prepare(Prepare(str(folder / "a.jsonl"), str(out), tokenizer, held_out=0.3, processes=1))
    (folder / "bpe.json").unlink(missing_ok=True)
    return out


def test_scripts_get_the_counts_and_the_windows(corpus: Path) -> None:
    found = json.loads(inspect(Inspect(str(corpus), json=True, windows=3, sequence_length=100)))
    assert sum(split["documents"] for split in found["splits"].values()) == len(TEXTS)
    assert sum(split["bytes"] for split in found["splits"].values()) == sum(len(text.encode()) for text in TEXTS)
    assert list(found["skipped"].values()) == [1]
    for split in found["splits"].values():
        lengths = split["tokens_per_document"]
        assert lengths["min"] <= lengths["median"] <= lengths["99 %"] <= lengths["max"]
        assert lengths["mean"] == split["tokens"] / split["documents"]
    copies = found["copies"]
    assert copies["documents"] == 3
    assert copies["shared"] == 0, "held out by their content"
    assert [(one["times"], one["begins"].split("<")[0]) for one in copies["worst"]] == [
        (3, "one\n"),
        (2, "two, naïve\n"),
    ]
    assert len(found["windows"]) == 3
    for window in found["windows"]:
        assert sum(piece["tokens"] for piece in window["pieces"]) == 100
        for piece in window["pieces"][1:-1]:
            assert piece["text"].removesuffix("<|end_of_document|>") in TEXTS


def test_people_see_the_borders_and_nothing_that_a_terminal_obeys(corpus: Path) -> None:
    both: list[Literal["train", "valid"]] = ["train", "valid"]
    shown = "\n".join(inspect(Inspect(str(corpus), split=s, windows=1, sequence_length=20_000)) for s in both)
    assert "\x1b" not in shown
    assert r"three\x1b[31m" in shown
    assert shown.count("── a document from token ") >= len(TEXTS)
    assert "3 times" in shown
    assert "left out: 1 (empty document" in shown
    assert "lines …" in shown


@pytest.fixture
def own_signals() -> Iterator[None]:
    """A command line sets one."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("own_signals")
def test_the_command_line(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(corpus), "--json", "windows=1"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == str(corpus)


@pytest.mark.usefixtures("own_signals")
def test_a_reader_that_has_seen_enough_is_no_failure(
    corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        assert main(["inspect", str(corpus), "windows=1"]) == 0
    assert not capsys.readouterr().err


def test_a_corpus_without_its_tokenizer_shows_ids(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", [[1, 2, 9], [3, 9]], 10)
    found = json.loads(inspect(Inspect(str(tmp_path / "corpus"), json=True, windows=1, sequence_length=3)))
    assert {piece["text"] for piece in found["windows"][0]["pieces"]} < {"1 2 9", "3 9", "3", "1", "1 2"}
    assert found["splits"]["valid"] == {"documents": 0, "tokens": 0, "bytes": 0}


@pytest.mark.parametrize("windows", [0, 1, 5])
def test_as_many_windows_as_asked_for_of_a_split_shorter_than_one(windows: int, corpus: Path) -> None:
    found = json.loads(inspect(Inspect(str(corpus), json=True, windows=windows, sequence_length=1 << 20)))
    assert len(found["windows"]) == windows


def test_a_damaged_corpus_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="holds no prepared corpus"):
        inspect(Inspect(str(tmp_path)))
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in corpus.iterdir():
        (copy / path.name).write_bytes(path.read_bytes() + (b"x" if path.name == "train.bin" else b""))
    with pytest.raises(Refused, match="is too long"):
        inspect(Inspect(str(copy)))
