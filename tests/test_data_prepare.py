"""Text to a corpus: what goes in comes out, whatever the processes and interruptions; bad input changes nothing."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from conf.schema import Refused
from data import join
from data import prepare as preparing
from data.corpus import Config
from data.loader import Loader
from data.manifest import Manifest
from data.megatron import indexed_dataset
from data.prepare import Prepare, prepare
from data.records import EMPTY, MALFORMED, NO_TEXT, NOT_UTF8
from data.verify import Verify, verify

ROOT = Path(__file__).parents[1]
SPLITS = ("train", "valid")


def documents(out: Path, split: str) -> list[list[int]]:
    """As Megatron itself reads them."""
    dataset = indexed_dataset().IndexedDataset(str(out / split))
    assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
    return [dataset[i].tolist() for i in range(len(dataset))]


def tree(folder: Path) -> dict[str, str]:
    """Every file below `folder` by a hash of its content."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def write_texts(folder: Path) -> Path:
    """24 text files, and JSONL of all kinds of lines."""
    folder.mkdir()
    for i in range(24):
        (folder / f"{i:02}.txt").write_text(f"number {i}: naïve\n" * (i + 1))
    (folder / "empty.txt").write_text(" \n")
    (folder / "latin.txt").write_bytes(b"na\xefve")
    (folder / ".hidden").write_text("not me")
    lines = [
        json.dumps({"text": "a line"}),
        "",
        '{"text": "cut',
        "[1]",
        json.dumps({"body": "no text"}),
        json.dumps({"text": 3}),
        json.dumps({"text": ""}),
        '{"text": "half a pair \\ud800"}',
        "[" * 100_000,
        json.dumps({"text": "last, without a newline"}),
    ]
    (folder / "lines.jsonl").write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    return folder


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "texts")
    out = tmp_path / "new" / "corpus"
    said = prepare(Prepare(str(source), str(out), held_out=0.25, processes=2))
    manifest = Manifest.read(out)
    texts = [path.read_bytes() for path in sorted(source.glob("[0-9]*.txt"))] + [b"a line", b"last, without a newline"]
    read = {split: documents(out, split) for split in SPLITS}
    assert all(d[-1] == manifest.end_of_document == 256 for split in SPLITS for d in read[split])
    assert sorted(bytes(d[:-1]) for split in SPLITS for d in read[split]) == sorted(texts)
    for split in SPLITS:
        facts = manifest.splits[split]
        flat = np.concatenate(read[split])
        shares = np.bincount(flat)[np.unique(flat)] / len(flat)
        assert facts.documents == len(read[split]) > 0
        assert facts.tokens == len(flat)
        assert facts.bytes == len(flat) - len(read[split])
        assert facts.unigram_entropy == pytest.approx(-(shares * np.log(shares)).sum())
        source_of = Config(str(out), "train" if split == "train" else "valid").open()
        assert source_of.bytes_per_token == facts.bytes / facts.tokens
        assert Loader(source_of, sequence_length=16).batch(0, 1).ids.shape == (1, 16)
    assert manifest.skipped == {EMPTY: 2, NOT_UTF8: 2, MALFORMED: 3, NO_TEXT: 2}
    assert "2 skipped (invalid UTF-8)" in said
    assert "is whole" in verify(Verify(str(out)))
    assert os.listdir(tmp_path / "new") == ["corpus"], "nothing else is left"


@pytest.mark.parametrize("there", [True, False])
def test_out_may_be_a_link_to_an_empty_folder_or_to_where_one_is_to_be(there: bool, tmp_path: Path) -> None:
    disk, link = tmp_path / "disk", tmp_path / "link"
    disk.mkdir()
    if there:
        (disk / "corpus").mkdir()
    link.symlink_to(disk / "corpus")
    request = Prepare(str(write_texts(tmp_path / "texts")), str(link), processes=1)
    prepare(request)
    assert "is whole" in verify(Verify(str(disk / "corpus")))
    assert link.is_symlink()
    assert "already prepared" in prepare(request)
    assert sorted(path.name for path in (*tmp_path.iterdir(), *disk.iterdir())) == ["corpus", "disk", "link", "texts"]


def once_parts_are_made(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """`prepare` does `act` before it joins them."""

    def joined(parts: Iterable[Path], *arguments: Any) -> Manifest:
        made = [*parts]
        act()
        return join.join(made, *arguments)

    monkeypatch.setattr(preparing, "join", joined)


def word_tokenizer(path: Path, special: list[str]) -> Path:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(special)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(path))
    return path


def test_a_hugging_face_tokenizer_neither_truncates_nor_reads_special_tokens_in_text(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(tmp_path / "tokenizer.json", ["END"])
    (tmp_path / "a.txt").write_text("a b a b a END b")
    prepare(Prepare(str(tmp_path / "a.txt"), str(tmp_path / "out"), str(tokenizer), processes=1))
    assert documents(tmp_path / "out", "train") == [[0, 1, 0, 1, 0, 2, 1, 3]]
    assert Manifest.read(tmp_path / "out").vocab == 4


def test_a_tokenizer_that_is_written_anew_meanwhile_fails_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The corpus would hold another than the one that made its ids."""
    tokenizer = word_tokenizer(tmp_path / "tokenizer.json", ["END"])
    (tmp_path / "a.txt").write_text("a b")

    once_parts_are_made(monkeypatch, lambda: word_tokenizer(tokenizer, ["STOP"]))
    with pytest.raises(OSError, match=r"tokenizer\.json changed while text was encoded"):
        prepare(Prepare(str(tmp_path / "a.txt"), str(tmp_path / "out"), str(tokenizer), processes=1))
    assert not (tmp_path / "out").exists()


NO_MORE_PARTS = """
import os, time
from pathlib import Path
fsync = os.fsync
def held(descriptor):
    while len(list(Path({work!r}).glob("*/*.npz"))) >= int(os.environ["PARTS"]):
        time.sleep(0.05)
    fsync(descriptor)
os.fsync = held
"""
"""Whoever prepares waits with so many parts, for as long as the test needs to kill it."""


def test_bytes_do_not_depend_on_processes_or_interruptions(tmp_path: Path) -> None:
    """Killed twice while the parts are made and once after, then run again: the corpus of an uninterrupted run."""
    source = tmp_path / "lines.jsonl"
    rng = np.random.default_rng(0)
    lines = (json.dumps({"text": "x" * int(n), "n": i}) for i, n in enumerate(rng.integers(0, 40_000, 450)))
    source.write_text("\n".join(lines))
    settings = [f"source={source}", "held_out_by=document", "held_out=0.2"]
    whole = tmp_path / "whole"
    assert command("prepare", *settings, f"out={whole}", "processes=3").returncode == 0

    out = tmp_path / "out"
    work = tmp_path / "out.preparing"
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "sitecustomize.py").write_text(NO_MORE_PARTS.format(work=str(work)))
    held = {**os.environ, "PYTHONPATH": f"{tmp_path / 'disk'}:{ROOT}"}
    for num_parts in (1, 4, 8):
        words = arguments("prepare", *settings, f"out={out}", "processes=1")
        process = subprocess.Popen(words, cwd=ROOT, env={**held, "PARTS": str(num_parts)})
        while len(list(work.glob("*/*.npz"))) < num_parts and process.poll() is None:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not out.exists()
        assert len(list(work.glob("*/*.npz"))) == num_parts
    finished = command("prepare", *settings, f"out={out}", "processes=2")
    assert finished.returncode == 0
    assert "going on from" in finished.stderr
    assert tree(out) == tree(whole)
    assert not work.exists()

    again = command("prepare", *settings, f"out={out}")
    assert again.returncode == 0
    assert "already prepared" in again.stdout


def test_a_full_disk_fails_and_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    """The limit on a file's size stands for the disk: the write fails, in a worker or when the parts are joined."""
    source = tmp_path / "lines.jsonl"
    source.write_text("\n".join(json.dumps({"text": f"{i} " * 2000}) for i in range(300)))
    out = tmp_path / "out"
    for blocks in (64, 3000):
        limited = ["bash", "-c", f'ulimit -f {blocks}; exec "$@"', "limited"]
        failed = command("prepare", f"source={source}", f"out={out}", prefix=limited)
        assert failed.returncode == 1
        assert "failed: [Errno 27] File too large" in failed.stderr
        assert "Finished parts are kept" in failed.stderr
        assert "Traceback" not in failed.stderr
        assert not out.exists()
    whole = tmp_path / "whole"
    assert command("prepare", f"source={source}", f"out={whole}").returncode == 0
    finished = command("prepare", f"source={source}", f"out={out}")
    assert "going on from" in finished.stderr, "nothing that was finished is lost"
    assert tree(out) == tree(whole)


@pytest.mark.parametrize(
    "interrupt",
    [
        pytest.param(lambda pid: os.kill(pid, signal.SIGTERM), id="SIGTERM of the command"),
        pytest.param(lambda pid: os.killpg(pid, signal.SIGINT), id="Ctrl-C, which all its processes get"),
    ],
)
def test_an_interruption_waits_for_no_more_than_the_records_in_hand(
    interrupt: Callable[[int], None], tmp_path: Path
) -> None:
    """One portion of 3,000,000 documents, of which a part holds a hundredth."""

    def parts() -> list[Path]:
        return list(tmp_path.glob("out.preparing/*/*.npz"))

    with gzip.open(tmp_path / "lines.jsonl.gz", "wb", compresslevel=1) as file:
        file.write(b'{"text": "ab"}\n' * 3_000_000)
    words = arguments("prepare", f"source={tmp_path / 'lines.jsonl.gz'}", f"out={tmp_path / 'out'}")
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # ignored where the suite itself was started in the background
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not parts() and process.poll() is None:
        time.sleep(0.01)
    before = len(parts())
    interrupt(process.pid)
    _, said = process.communicate()
    assert len(parts()) - before < 20, "how quick it is on this machine is not in question, but what it still does is"
    assert process.returncode == 75
    assert said.startswith("interrupted. Finished parts are kept")
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def arguments(*words: str) -> list[str]:
    return [sys.executable, "-m", "data", *words]


def command(*words: str, prefix: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*(prefix or []), *arguments(*words)], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        pytest.param(["prepar"], "'prepar' is no command", id="misspelt-command"),
        pytest.param(["prepare", "out={}/o"], "source is missing", id="no-source"),
        pytest.param(["prepare", "source=stdlib"], "out is missing", id="no-out"),
        pytest.param(["prepare", "sorce=stdlib", "out={}/o"], "did you mean 'source'", id="misspelt-key"),
        pytest.param(["prepare", "stdlib", "out={}/o"], "'stdlib' is not of the form key=value", id="no-key"),
        pytest.param(["prepare", "out={}/a", "out={}/b"], "out is given twice", id="twice"),
        pytest.param(["prepare", "source=stdlib", "out={}/o", "processes=two"], "processes is 'two'", id="wrong-type"),
        pytest.param(["prepare", "source=stdlib", "out={}/o", "processes=0"], "at least 1", id="no-process"),
        pytest.param(["prepare", "source=stdlib", "out={}/o", "held_out=1.5"], "held_out is 1.5", id="share"),
        pytest.param(["prepare", "source=stdlib", "out={}/o", "held_out_by=fil"], "did you mean 'file'", id="choice"),
        pytest.param(["prepare", "source={}/nowhere", "out={}/o"], "names no file", id="no-file"),
        pytest.param(["prepare", "source={}/none", "out={}/o"], "names no file", id="empty-folder"),
        pytest.param(["prepare", "source={}/texts/*.md", "out={}/o"], "names no file", id="glob-of-nothing"),
        pytest.param(["prepare", "source={}/blank", "out={}/x/y/o"], "no document to train.*empty", id="only-blanks"),
        pytest.param(["prepare", "source={}/texts", "out=/proc/none/o"], "cannot be written", id="read-only"),
        pytest.param(["prepare", "source={}/texts", "out={}/texts/o"], "lies inside the source", id="out-in-source"),
        pytest.param(["prepare", "source={}/texts", "out={}/none/../texts"], "lies inside", id="out-is-source"),
        pytest.param(["prepare", "source={}/texts", "out={}/blank"], "is not a prepared corpus", id="out-of-others"),
        pytest.param(["prepare", "source={}/texts", "out={}/blank/a.txt"], "is not a prepared", id="out-is-a-file"),
        pytest.param(["prepare", "source={}/texts", "out={}/blank/a.txt/o"], "is not a folder", id="out-below-a-file"),
        pytest.param(["prepare", "source={}/texts", "out={}/o", "tokenizer=byte"], "neither 'bytes'", id="tokenizer"),
        pytest.param(
            ["prepare", "source={}/texts", "out={}/o", "tokenizer={}/texts/a.txt"],
            "not a tokenizer.json that can be read",
            id="tokenizer-of-another-kind",
        ),
        pytest.param(
            ["prepare", "source={}/texts", "out={}/o", "tokenizer={}/two.json"],
            r"Give end_of_document=TOKEN \(special tokens: <a>, <b>\)",
            id="end-of-document-unclear",
        ),
        pytest.param(
            ["prepare", "source={}/texts", "out={}/o", "tokenizer={}/two.json", "end_of_document=<c>"],
            "'<c>', which is no token",
            id="end-of-document-unknown",
        ),
        pytest.param(
            ["prepare", "source={}/texts", "out={}/o", "end_of_document=<c>"],
            "leave end_of_document out",
            id="end-of-document-of-bytes",
        ),
        pytest.param(
            ["train-tokenizer", "source={}/texts", "out={}/blank/a.txt/o"],
            "o cannot be made in .*a.txt; choose another out",
            id="tokenizer-below-a-file",
        ),
        pytest.param(["verify", "path={}/none"], "holds no prepared corpus", id="verify-nothing"),
        pytest.param(["bench", "path={}/none"], "holds no prepared corpus", id="bench-nothing"),
        pytest.param(["bench-prepare", "source={}/blank"], "blank holds no document", id="bench-of-blanks"),
        pytest.param(["bench-prepare", "source={}/texts", "repeats=0"], "at least 1", id="bench-no-run"),
        pytest.param(
            ["bench-prepare", "source={}/texts", "tokenizer={}/two.json"],
            "Give end_of_document=TOKEN",
            id="bench-end-of-document-unclear",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_changes_nothing(words: list[str], sentence: str, tmp_path: Path) -> None:
    for folder in ("texts", "blank", "none"):
        (tmp_path / folder).mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text")
    (tmp_path / "blank" / "a.txt").write_text(" \n")
    word_tokenizer(tmp_path / "two.json", ["<a>", "<b>"])
    before = sorted(tmp_path.rglob("*")), tree(tmp_path)
    refused = command(*[word.format(tmp_path) for word in words])
    assert refused.returncode == 2, refused.stderr
    assert refused.stdout == ""
    assert len(refused.stderr.splitlines()) == 1
    assert re.search(f"^refused: .*{sentence}", refused.stderr), refused.stderr
    assert (sorted(tmp_path.rglob("*")), tree(tmp_path)) == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        pytest.param(lambda first: replace(first, held_out=0.5), "held_out", id="held-out"),
        pytest.param(lambda first: replace(first, text_key="body"), "text_key", id="text-key"),
        pytest.param(lambda first: replace(first, source=f"{first.source}/../other"), "files", id="files"),
    ],
)
def test_a_corpus_of_other_settings_is_left_alone(
    change: Callable[[Prepare], Prepare], named: str, tmp_path: Path
) -> None:
    for folder, content in (("same", "text"), ("other", "other text")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(content)
    first = Prepare(str(tmp_path / "same"), str(tmp_path / "out"), processes=1)
    prepare(first)
    before = tree(tmp_path)
    with pytest.raises(Refused, match=f"was prepared with other {named};"):
        prepare(change(first))
    assert "already prepared" in prepare(first)
    assert tree(tmp_path) == before
