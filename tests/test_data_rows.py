"""Rows of the `datasets` library: however they are opened, they are the records of the same JSONL."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from conf.schema import Refused
from data import bench_prepare
from data.bench_prepare import BenchPrepare, Run
from data.manifest import Manifest
from data.prepare import Prepare, prepare
from data.records import EMPTY, NO_TEXT, NOT_UTF8
from data.rows import RowPortion
from data.texts import TextSource
from tests.test_data_prepare import once_parts_are_made

LIMIT = 1000


def texts() -> list[str | None]:
    """Short, empty, missing, odd and over the limit."""
    rng = np.random.default_rng(0)
    some: list[str | None] = [f"{i} naïve 𐍈\n" * int(n) for i, n in enumerate(rng.integers(1, 30, 300))]
    some[7], some[70], some[150], some[299] = "", None, " \n", "a line\n" * 500
    return some


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The texts in each form in which they can be kept."""
    folder = tmp_path_factory.mktemp("rows")
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    rows = {"text": texts(), "n": list(range(300))}
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()))
    table = pa.table(rows)
    (folder / "parquet").mkdir()
    for name, part in (("0", table.slice(0, 40)), ("[1]*", table.slice(40))):
        parquet.write_table(part, folder / "parquet" / f"{name}.parquet", row_group_size=70)
    dataset = datasets.Dataset(table)
    dataset.save_to_disk(folder / "saved", num_shards=3)
    datasets.DatasetDict(train=dataset, test=dataset.select(range(2))).save_to_disk(folder / "splits")
    return folder


@pytest.mark.parametrize(
    ("source", "keys"),
    [
        pytest.param("parquet", {}, id="folder-of-parquet"),
        pytest.param("parquet/*.parquet", {}, id="glob-of-parquet"),
        pytest.param("datasets:saved", {}, id="saved"),
        pytest.param("datasets:splits", {}, id="saved-with-splits"),
        pytest.param("datasets:parquet", {"data_files": "parquet/*.parquet"}, id="parquet-builder"),
        pytest.param("datasets:json", {"data_files": "a.jsonl"}, id="json-builder"),
        pytest.param("datasets:json", {"data_files": "a.jsonl", "streaming": True}, id="json-builder-streaming"),
        pytest.param(
            "datasets:parquet", {"data_files": "parquet/*.parquet", "streaming": True}, id="parquet-builder-streaming"
        ),
    ],
)
def test_every_way_gives_the_records_of_the_same_jsonl(
    source: str, keys: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    expected = read(TextSource("a.jsonl", max_document=LIMIT))
    assert read(TextSource(source, max_document=LIMIT, **keys)) == expected
    assert {EMPTY, NO_TEXT, None} == {skipped for _, skipped, _, _ in expected}
    assert any(cut for _, _, _, cut in expected)


def read(source: TextSource) -> list[tuple[str | None, str | None, int, bool]]:
    """The records, in order, as a worker gets them."""
    portions = (pickle.loads(pickle.dumps(portion)) for portion in source.open().portions())
    return [(r.text, r.skipped, r.document, r.cut) for portion in portions for r in portion.records()]


def test_parquet_becomes_the_corpus_of_the_same_jsonl(folder: Path, tmp_path: Path) -> None:
    made = []
    for source in ("parquet", "a.jsonl"):
        out = tmp_path / source
        prepare(Prepare(f"{folder}/{source}", str(out), held_out=0.2, processes=1, max_document=LIMIT))
        made.append(Manifest.read(out))
    assert made[0].splits == made[1].splits
    assert made[0].skipped == made[1].skipped == {EMPTY: 2, NO_TEXT: 1}
    assert made[0].cut == made[1].cut > 0
    assert all(split.documents for split in made[0].splits.values())


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_what_is_timed_is_one_file_of_the_documents_wherever_they_came_from(
    form: bench_prepare.Form, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = []

    def run(name: str, request: BenchPrepare) -> Run:
        timed.append((name, read(request), request.processes))
        return Run({name: (1.0, 1.0)}, 1, 0)

    monkeypatch.setattr(bench_prepare, "_fresh_process", run)
    source = BenchPrepare(
        "datasets:json", data_files=f"{folder}/a.jsonl", rows=60, max_document=LIMIT, form=form, processes=3, repeats=2
    )
    bench_prepare.bench_prepare(source)
    expected = [text for text, *_ in read(source) if text is not None]
    assert [name for name, *_ in timed] == ["prepare", "datasets"] * 2
    assert all([text for text, *_ in found] == expected and processes == 3 for _, found, processes in timed)


def test_the_first_rows_are_those_of_the_whole(folder: Path) -> None:
    first = read(TextSource(f"{folder}/parquet", rows=60))
    assert len(first) == 60
    assert first == read(TextSource(f"{folder}/parquet"))[:60]


@pytest.mark.parametrize(
    ("kind", "name", "prefix"),
    [
        pytest.param("parquet", "0.parquet", "", id="parquet"),
        pytest.param("saved", "data-00001-of-00003.arrow", "datasets:", id="saved"),
    ],
)
def test_a_file_that_is_written_to_meanwhile_fails_the_whole(
    kind: str, name: str, prefix: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(folder / kind, tmp_path / kind)
    once_parts_are_made(monkeypatch, lambda: os.utime(source / name, ns=(0, 1)))
    with pytest.raises(OSError, match=f"{name} changed while it was read"):
        prepare(Prepare(f"{prefix}{source}", str(tmp_path / "out"), processes=1))
    assert not (tmp_path / "out").exists()


def test_text_that_is_not_utf8_is_counted(tmp_path: Path) -> None:
    """Parquet says text and holds any bytes; one such row must not fail the rows around it."""
    bad = pa.array([b"good", b"na\xefve", b"also good"]).view(pa.string())
    parquet.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    found = read(TextSource(str(tmp_path / "a.parquet")))
    assert [text or skipped for text, skipped, _, _ in found] == ["good", NOT_UTF8, "also good"]


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(lambda texts: pa.array(texts, pa.large_string()), id="large-string"),
        pytest.param(lambda texts: pa.array(texts).dictionary_encode(), id="dictionary"),
    ],
)
def test_kinds_of_text_columns(kind: Callable[[list[str]], pa.Array], tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": kind(["a", "b", "a"])}), tmp_path / "a.parquet")
    assert [text for text, *_ in read(TextSource(str(tmp_path / "a.parquet")))] == ["a", "b", "a"]


def test_copies_are_held_out_together(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"text {i % 50}"}) for i in range(500)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    prepare(Prepare(str(tmp_path / "a.jsonl"), str(tmp_path / "out"), held_out=0.3, processes=1))
    counts = [split.documents for split in Manifest.read(tmp_path / "out").splits.values()]
    assert all(count % 10 == 0 and count > 0 for count in counts)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        pytest.param({"source": "parquet", "text_key": "body"}, "has no column 'body'", id="column-of-parquet"),
        pytest.param({"source": "datasets:saved", "text_key": "body"}, "has no column 'body' but text, n", id="column"),
        pytest.param(
            {"source": "datasets:splits", "split": "valid"}, "no split 'valid'; choose one of train, test", id="split"
        ),
        pytest.param({"source": "datasets:saved", "held_out_by": "file"}, "has no file to hold out", id="held-out-by"),
        pytest.param({"source": "datasets:json"}, "datasets cannot open 'json'", id="no-data-files"),
        pytest.param(
            {"source": "datasets:json", "data_files": "none*"}, "datasets cannot open 'json'", id="no-such-files"
        ),
        pytest.param({"source": "datasets:./nowhere"}, "datasets cannot open './nowhere'", id="no-such-folder"),
        pytest.param({"source": "parquet", "split": "test"}, "split says how a dataset", id="split-of-parquet"),
        pytest.param({"source": "saved"}, "open it with source=datasets", id="saved-as-files"),
        pytest.param({"source": "mixed"}, r"holds Parquet and other files \(b.txt\)", id="mixed"),
        pytest.param({"source": "bad.parquet"}, "datasets cannot open 'bad.parquet'", id="damaged"),
        pytest.param({"source": "a.jsonl", "rows": 3}, "rows counts the rows of a dataset", id="rows-of-files"),
    ],
)
def test_what_cannot_be_opened_is_refused(
    keys: dict[str, Any], sentence: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (folder / "bad.parquet").write_bytes(b"PAR1 no")
    (folder / "mixed").mkdir(exist_ok=True)
    (folder / "mixed" / "a.parquet").write_bytes((folder / "parquet" / "0.parquet").read_bytes())
    (folder / "mixed" / "b.txt").write_text("text")
    with pytest.raises((Refused, ValueError)) as refused:
        prepare(Prepare(out=str(tmp_path / "out"), **keys))
    assert re.search(sentence, str(refused.value)), refused.value
    assert not list(tmp_path.iterdir())


def test_keys_of_datasets_need_a_dataset() -> None:
    with pytest.raises(ValueError, match="streaming says how a dataset is opened"):
        TextSource("stdlib", streaming=True)


def test_a_job_carries_the_stream_and_not_the_rows(folder: Path) -> None:
    portions = TextSource(f"datasets:{folder}/saved").open().portions()
    assert all(isinstance(s, RowPortion) and len(s.stream) < 100_000 for s in portions)
