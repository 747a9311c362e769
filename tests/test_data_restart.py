"""Work that is cut short anywhere goes on to the same bytes, and its memory does not grow with the source."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data import part, workers
from data.manifest import Manifest
from data.megatron import indexed_dataset
from data.part import Job, Part, make_parts
from data.prepare import make_all_parts
from data.records import MALFORMED, NOT_UTF8
from data.split import HeldOut
from data.texts import TextSource
from data.tokenfile import BLOCK, TokenFile

ROOT = Path(__file__).parents[1]
KILLS = 7


def write_source(folder: Path) -> Path:
    """JSONL with bad lines, and a text file over the limit; 22 portions."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = [json.dumps({"text": "line\n" * int(n)}) for n in rng.integers(0, 6_000, 300)]
    lines[::50] = ['{"text": "cut'] * len(lines[::50])
    (folder / "a.jsonl").write_text("\n".join(lines))
    (folder / "b.txt").write_text("a text without end\n" * 50_000)
    (folder / "c.txt").write_bytes(b"na\xefve")
    return folder


def command(source: Path, out: Path) -> list[str]:
    words = [f"source={source}", f"out={out}", "held_out=0.2", "max_document=200000", "processes=2"]
    return [sys.executable, "-m", "data", "prepare", *words]


def tree(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def descendants(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [found for child in children for found in (int(child), *descendants(int(child)))]


def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """SIGKILL of the command, or of one of its processes, which it must notice and say."""
    source = write_source(tmp_path / "texts")
    began = time.monotonic()
    subprocess.run(command(source, tmp_path / "whole"), cwd=ROOT, check=True, capture_output=True)
    took = time.monotonic() - began
    seed = int(time.time())
    print(f"moments drawn with the seed {seed}, of {took:.2f} s")
    moments = random.Random(seed)
    out = tmp_path / "out"
    ends: list[int] = []
    for _ in range(KILLS):
        process = subprocess.Popen(command(source, out), cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        began = time.monotonic()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moments.uniform(0.2, 0.8) * took)
            took = time.monotonic() - began  # the machine has become quicker
        landed = any(ends)
        victim = moments.choice([process.pid, *descendants(process.pid)]) if landed else process.pid
        with contextlib.suppress(ProcessLookupError):  # it was done, or a worker was
            os.kill(victim, signal.SIGKILL)
        _, said = process.communicate()
        ends.append(process.returncode)
        assert process.returncode in (0, 1, -signal.SIGKILL), said
        assert process.returncode != 1 or b"the same command goes on from there" in said
        assert b"process pool" not in said, "a sentence of ours, not of the library that runs the workers"
        assert out.exists() or process.returncode != 0  # it may be killed once OUT is there, before it has ended
        if out.exists():  # the next kill must find work to interrupt
            assert tree(out) == tree(tmp_path / "whole")
            shutil.rmtree(out)
    assert any(ends), f"no kill landed: {ends}"
    finished = subprocess.run(command(source, out), cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert tree(out) == tree(tmp_path / "whole")
    made = Manifest.read(out)
    assert made.skipped == {MALFORMED: 6, NOT_UTF8: 1}
    assert made.cut == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "texts", "whole"]


def test_a_portion_goes_on_behind_any_of_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And where one of them is damaged, from that one on."""
    monkeypatch.setattr(part, "PORTION", 60_000)
    monkeypatch.setattr(part, "BATCH", 10_000)
    monkeypatch.setattr(workers, "progress", lambda done: None)
    portion = next(TextSource(str(write_source(tmp_path / "texts") / "a.jsonl")).open().portions())

    def parts(folder: Path) -> dict[str, bytes]:
        folder.mkdir(exist_ok=True)
        made = make_parts(Job(portion, folder / "0", "bytes", None, HeldOut("document", 2**62)))
        return {path.name: path.read_bytes() for path in made}

    whole = parts(tmp_path / "whole")
    assert len(whole) > 3
    assert [Part.read(tmp_path / "whole" / name).is_last for name in whole] == [False] * (len(whole) - 1) + [True]
    for kept in range(len(whole)):
        folder = tmp_path / f"{kept}"
        folder.mkdir()
        for name in list(whole)[:kept]:
            (folder / name).write_bytes(whole[name])
        assert parts(folder) == whole
    for content in (whole["0.00001.npz"][:-9], b"", whole["0.00001.npz"][:3000].ljust(len(whole["0.00001.npz"]))):
        (tmp_path / "0" / "0.00001.npz").write_bytes(content)
        assert parts(tmp_path / "0") == whole
        assert "0.00001.npz is damaged and made anew" in capsys.readouterr().err


def test_many_short_documents_fill_a_part_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A document costs memory beside its text; 2,000 of 2 bytes are no 4 kB."""
    monkeypatch.setattr(part, "PORTION", 60_000)
    monkeypatch.setattr(part, "BATCH", 10_000)
    monkeypatch.setattr(workers, "progress", lambda done: None)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "ab"}\n' * 2_000)
    (portion,) = TextSource(str(path)).open().portions()
    made = [Part.read(path) for path in make_parts(Job(portion, tmp_path / "0", "bytes", None, HeldOut("document", 0)))]
    assert sum(one.records for one in made) == 2_000
    assert max(one.records for one in made) <= 300


def test_no_more_jobs_are_taken_than_keep_the_workers_busy(tmp_path: Path) -> None:
    """And the parts come in the order of the jobs."""
    (tmp_path / "a.txt").write_text("text")
    portion = next(TextSource(str(tmp_path / "a.txt")).open().portions())
    taken = []

    def jobs() -> Iterator[Job]:
        for number in range(40):
            taken.append(tmp_path / f"{number:02}")
            yield Job(portion, taken[-1], "bytes", None, HeldOut("file", -1))

    with contextlib.closing(make_all_parts(jobs(), ["data.part"], 1, None)) as parts:
        made = [next(parts)]
        assert len(taken) <= 4, "two, and two more where both are done"
        made += parts
    assert made == [path.with_name(f"{path.name}.00000.npz") for path in taken]
    assert len(made) == 40


@pytest.mark.parametrize("kind", [np.uint16, np.int32])
@pytest.mark.parametrize("documents", [0, 1, 1000, BLOCK + 1])
def test_token_files_are_those_of_megatron(kind: type, documents: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(documents)
    lengths = rng.integers(1, 4, documents).astype(np.int32)
    tokens = rng.integers(0, 60_000, lengths.sum()).astype(kind)
    ours = TokenFile(tmp_path / "ours", kind)
    for some in np.array_split(tokens, 3):
        ours.add_tokens(some)
    for some in np.array_split(lengths, 2):
        ours.add_lengths(some)
    ours.close()
    theirs = indexed_dataset().IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=kind)
    ends = np.cumsum(lengths)
    for begin, end in zip(ends - lengths, ends, strict=True):
        theirs.add_document(tokens[begin:end], [int(end - begin)])
    theirs.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()


MEASURE = """
import json, re, resource, sys
from multiprocessing import forkserver
from pathlib import Path
from data.prepare import Prepare, prepare
prepare(Prepare(sys.argv[1], sys.argv[2], processes=1))
forkserver._forkserver._stop()
own = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())  # getrusage counts from before exec
print(json.dumps([int(own[1]), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]))
"""


def test_memory_does_not_grow_with_the_source(tmp_path: Path) -> None:
    """A third and the whole of 60 MB in 100,000 documents, in one portion; a third already fills several parts."""
    peaks, sizes = [], []
    for documents in (30_000, 100_000):
        path = tmp_path / f"{documents}.jsonl.gz"
        with gzip.open(path, "wt", compresslevel=1) as file:
            file.writelines(f'{{"text": "{i} {"some text " * 59}"}}\n' for i in range(documents))
        measured = [sys.executable, "-c", MEASURE, str(path), str(tmp_path / f"{documents}")]
        done = subprocess.run(measured, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        peaks.append([1024 * kib for kib in json.loads(done.stdout)])
        sizes.append(sum(split.bytes for split in Manifest.read(tmp_path / f"{documents}").splits.values()))
    grown = sizes[1] - sizes[0]
    for small, large in zip(*peaks, strict=True):
        assert large - small < grown / 10, "a hundred bytes a document would be more"


def test_what_is_started_while_signals_are_held_up_gets_no_ctrl_c() -> None:
    """It would break off in the middle of an import, with a traceback."""
    says = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    with workers.held_up():
        child = subprocess.run([sys.executable, "-c", says], capture_output=True, text=True)
    assert child.stdout == "True\n"
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_temporary_folder_too_long_for_a_socket_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / ("x" * workers.LONGEST_FOLDER)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with pytest.raises(RuntimeError, match=r"x is too long for the sockets .* set TMPDIR to a shorter folder"):
        workers.run_apart(len, "text", modules=[])
