"""A tokenizer trained here: the same file each time, every text back as it was, documents ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, pre_tokenizers

from conf.schema import Refused
from data.manifest import Manifest
from data.prepare import Prepare, prepare
from data.tokenizer import HuggingFace
from data.train_tokenizer import END, WORDS, TrainTokenizer, cut, train_tokenizer
from data.workers import run_apart
from tests.ranks import PATIENCE
from tests.test_data_restart import descendants

ROOT = Path(__file__).parents[1]
SAMPLE = 300_000


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer") / "new" / "bpe.json"
    said = train_tokenizer(TrainTokenizer("stdlib", str(out), vocab=1000, sample=SAMPLE))
    assert "1,000 tokens from" in said
    return out


def test_the_same_file_each_time(trained: Path, tmp_path: Path) -> None:
    """Whatever the number of threads and Python's hashing."""
    words = ["train-tokenizer", "source=stdlib", f"out={tmp_path / 'bpe.json'}", "vocab=1000", f"sample={SAMPLE}"]
    others = {**os.environ, "RAYON_NUM_THREADS": "3", "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-m", "data", *words], cwd=ROOT, capture_output=True, text=True, env=others)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "bpe.json").read_bytes() == trained.read_bytes()
    with pytest.raises(Refused, match="exists; choose another out"):
        train_tokenizer(TrainTokenizer("stdlib", str(tmp_path / "bpe.json")))


def threads(pid: int) -> int:
    """None of a process that has ended."""
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return 0


def test_an_interruption_does_not_wait_for_the_library(tmp_path: Path) -> None:
    """Which may train for hours, and runs no signal handler meanwhile."""
    words = ["train-tokenizer", "source=stdlib", f"out={tmp_path / 'bpe.json'}", "vocab=60000"]
    process = subprocess.Popen([sys.executable, "-m", "data", *words], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    training: list[int] = []
    while process.poll() is None and not training:
        time.sleep(0.01)
        # the one that trains has threads, multiprocessing's helpers have none
        training = [pid for pid in descendants(process.pid) if threads(pid) > 1]
    os.kill(training[0], signal.SIGSTOP)  # it will never end
    process.terminate()
    _, said = process.communicate(timeout=PATIENCE)
    assert (process.returncode, said) == (75, "interrupted.\n")
    assert not list(tmp_path.iterdir())


def test_an_interruption_while_the_process_begins_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    begin, begun = ForkServerProcess.start, []

    def start(process: ForkServerProcess) -> None:
        begin(process)
        begun.append(process)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(ForkServerProcess, "start", start)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_apart(time.sleep, PATIENCE, modules=[])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not begun[0].is_alive()


@given(text=st.text(st.characters(codec="utf-8")))
def test_every_text_comes_back(trained: Path, text: str) -> None:
    tokenizer = HuggingFace(str(trained), None)
    (ids,) = tokenizer.encode([text])
    assert tokenizer.decode(ids.tolist()) == text
    assert tokenizer.end_of_document not in ids


@given(text=st.lists(st.one_of(st.text("a1.' \n\r\t", max_size=9), st.text(max_size=3))).map("".join))
def test_a_long_text_is_trained_on_in_pieces_that_have_its_words(text: str) -> None:
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    pieces = list(cut(text, 4))
    assert "".join(pieces) == text
    assert [w for piece in pieces for w, _ in split.pre_tokenize_str(piece)] == [
        w for w, _ in split.pre_tokenize_str(text)
    ]


def test_it_compresses_and_ends_documents(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"for name in names:\n    return {END}\n" * 50)
    prepare(Prepare(str(tmp_path / "a.txt"), str(tmp_path / "out"), str(trained), processes=1))
    facts = Manifest.read(tmp_path / "out")
    assert facts.end_of_document == Tokenizer.from_file(str(trained)).token_to_id(END) == 0
    assert facts.splits["train"].bytes > 2 * facts.splits["train"].tokens
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == trained.read_bytes()


def test_a_small_source_says_that_it_has_no_more_to_merge(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a b a b")
    said = train_tokenizer(TrainTokenizer(str(tmp_path / "a.txt"), str(tmp_path / "bpe.json"), vocab=1000))
    assert "(not 1,000: the sample holds no more pairs to merge)" in said


def test_nothing_to_train_on_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" ")
    with pytest.raises(Refused, match="name a source that holds text"):
        train_tokenizer(TrainTokenizer(str(tmp_path / "a.txt"), str(tmp_path / "bpe.json")))
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    with pytest.raises(ValueError, match="take 257"):
        TrainTokenizer("stdlib", "bpe.json", vocab=100)
