"""Which files a source means, how they are cut into work, and which documents are held out."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.schema import Refused
from data.files import STDLIB, File, Files, describe, list_files
from data.manifest import Manifest
from data.portions import FILE, cut, open_files
from data.prepare import Prepare, prepare
from data.records import Record, hash64
from data.split import HeldOut
from data.train_tokenizer import TrainTokenizer, train_tokenizer

ROOT = Path(__file__).parents[1]


def side(held_out: HeldOut, name: str, document: int = 0) -> str:
    return held_out.split(Record(name, "text", None, document, 0))


@given(st.lists(st.tuples(st.integers(0, 5 << 20), st.booleans()), min_size=1, max_size=12))
def test_parts_of_work_cover_each_file_once(files: list[tuple[int, bool]]) -> None:
    listed = [File(f"{i}.jsonl" if is_lines else f"{i}", "", size, 0) for i, (size, is_lines) in enumerate(files)]
    portions = list(cut(listed, 2 << 20, 1 << 20))
    chunks = [chunk for portion in portions for chunk in portion]
    for file in listed:
        mine = [chunk for chunk in chunks if chunk.name == file.name]
        assert [chunk.begin for chunk in mine] == [0, *(chunk.end for chunk in mine[:-1])]
        assert mine[-1].end == file.size
        assert file.is_lines or all(chunk.begin % (1 << 20) == 0 for chunk in mine), "where a long document is cut"
    assert [p.name for p in chunks] == sorted((p.name for p in chunks), key=lambda name: int(name.split(".")[0]))
    assert all(len(portion) <= (2 << 20) // FILE for portion in portions), "of empty files, too"


@given(st.lists(st.text(min_size=1), min_size=2, max_size=60, unique=True), st.floats(0.001, 0.999))
def test_both_sides_get_a_file_and_the_choice_is_the_files_own(names: list[str], share: float) -> None:
    names = [name.encode(errors="replace").decode() for name in names]
    if len(set(names)) < 2:
        return
    held_out = HeldOut.choose(share, "file", names)
    sides = {name: side(held_out, name) for name in names}
    assert set(sides.values()) == {"train", "valid"}
    assert HeldOut.choose(share, "file", names[::-1]) == held_out
    assert all(side(held_out, name, 7) == chosen for name, chosen in sides.items()), "a file goes to one side whole"


def test_shares_are_held_out_as_asked() -> None:
    names = [f"file {i}" for i in range(20_000)]
    for share in (0.05, 0.5):
        for held_out in (HeldOut.choose(share, "file", names), HeldOut.choose(share, "document", names)):
            found = sum(side(held_out, name, hash64(name.encode())) == "valid" for name in names)
            assert abs(found - share * len(names)) < 5 * (share * len(names)) ** 0.5
    assert {side(HeldOut.choose(0.0, "file", names), name) for name in names} == {"train"}
    assert HeldOut.choose(0.9, "file", names[:1]).split(Record(names[0], "", None, 0, 0)) == "train", (
        "a lone file is trained on"
    )


def test_the_standard_library_is_its_source_without_tests() -> None:
    files = list(list_files(STDLIB))
    names = {file.name for file in files}
    assert {"ast.py", "json/decoder.py"} <= names
    assert not any(set(name.split("/")) & {"test", "tests", "site-packages"} for name in names)
    assert sum(file.size for file in files) > 5_000_000
    assert files == list(list_files(STDLIB))


@pytest.mark.parametrize(
    ("source", "names"),
    [
        pytest.param("te*/0*.txt", ["texts/01.txt", "texts/02.txt"], id="in a folder"),
        pytest.param("texts/**/0*.txt", ["01.txt", "02.txt", "a/b/03.txt"], id="in any below"),
        pytest.param("**/a/**/0*", ["texts/a/b/03.txt"], id="below one of a name"),
        pytest.param("texts/**/*/*/*", ["a/b/03.txt"], id="two below, or more"),
        pytest.param("texts/0**", ["00", "01.txt", "02.txt"], id="two stars in a name"),
    ],
)
def test_a_glob_names_files_from_where_it_begins(source: str, names: list[str], tmp_path: Path) -> None:
    (tmp_path / "texts/a/b").mkdir(parents=True)
    for name in ("1", "00", "02.txt", "01.txt", "12.txt", "a/b/03.txt", ".04.txt"):
        (tmp_path / "texts" / name).touch()
    assert [file.name for file in list_files(f"{tmp_path}/{source}")] == names


def test_a_folder_is_called_by_its_name_however_it_is_spelt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "texts/a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "texts")
    assert {describe(source) for source in (".", "a/..", "../texts/", str(tmp_path / "texts"))} == {"texts"}


def test_a_list_of_files_that_does_not_fit_says_where_it_should_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").touch()
    full = sqlite3.connect("", check_same_thread=False)
    full.execute("PRAGMA max_page_count = 1")
    monkeypatch.setattr(sqlite3, "connect", lambda *_, **__: full)
    with pytest.raises(RuntimeError, match=r"temporary file \(database or disk is full\); set TMPDIR to a folder"):
        list_files(str(tmp_path))


def test_files_come_once_and_in_the_order_of_their_names_bytes(tmp_path: Path) -> None:
    names = ["a-b", "a.txt", "a/b", "a/c/d", "a0", "ab", "b/a", "\ue000", "𐍈", "\udcff"]
    for name in reversed(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for source in (str(tmp_path), f"{tmp_path}/**"):
        assert [file.name for file in list_files(source)] == sorted(names, key=os.fsencode)
    twice = [File(name, "", 0, 0) for name in [*names, *names]]
    assert [file.name for file in Files(twice)] == sorted(names, key=os.fsencode)


def test_nothing_is_held_for_a_file() -> None:
    """Python's own memory, exactly; what SQLite takes beside it is a cache of fixed size."""
    peaks = []
    for count in (1_000, 8_000):
        tracemalloc.start()
        files = Files(File(f"folder/{i}", f"/somewhere/folder/{i}", i % 100, i) for i in range(count))
        texts = open_files("texts", files, "text", 64)
        assert texts.plan != texts.fingerprint
        HeldOut.choose(0.1, "file", texts.names())
        assert sum(len(portion.chunks) for portion in texts.portions()) >= count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 16 * 7_000, "16 bytes a file"


def test_odd_names_and_links(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Names of any bytes are read; links in circles, to folders and to nowhere, and pipes, are not read, and told."""
    source = tmp_path / "odd"
    source.mkdir()
    names = [b"a\nb.txt", b"\xff\xfe.txt", " é.txt".encode(), b"*.txt"]
    for name in names:
        Path(os.fsdecode(os.fsencode(source) + b"/" + name)).write_text(f"{name!r}")
    (source / "circle").symlink_to(source)
    (source / "itself").symlink_to(source / "itself")
    (source / "nowhere").symlink_to(source / "gone")
    (source / "zlink").symlink_to(source / "*.txt")
    os.mkfifo(source / "pipe")
    for spelt in (source, source / "**", source / "**" / "*"):
        listed = list_files(str(spelt))
        assert [os.fsencode(file.name) for file in listed] == sorted([*names, b"zlink"])
        assert "4 links to folders or to nowhere, pipes or sockets" in capfd.readouterr().err
    said = prepare(Prepare(str(source), str(tmp_path / "out"), held_out=0.3, processes=1))
    assert "none skipped" in said


def test_a_name_that_is_no_text_is_told_without_failing(tmp_path: Path) -> None:
    source = tmp_path / os.fsdecode(b"\xff")
    source.mkdir()
    (source / "a.txt").write_text("text")
    command = [
        sys.executable,
        "-m",
        "data",
        "prepare",
        f"source={source}",
        f"out={tmp_path / os.fsdecode(bytes([254]))}",
    ]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, env={**os.environ, "LC_ALL": "C"}
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("use", "sentence"),
    [
        pytest.param(lambda f: list_files(f"{f}/texts"), r"mine\.txt may not be read by this user", id="file"),
        pytest.param(lambda f: prepare(Prepare(f"{f}/mine/a", f"{f}/o")), "cannot be listed: .*denied", id="source"),
        pytest.param(lambda f: prepare(Prepare(f"{f}/theirs", f"{f}/mine/o")), "o.* cannot be written", id="out"),
        pytest.param(
            lambda f: train_tokenizer(TrainTokenizer(f"{f}/theirs", f"{f}/mine/o")), "o cannot be made in", id="bpe"
        ),
        pytest.param(lambda f: Manifest.read(f / "mine"), r"cannot be read \(Permission denied\); see", id="corpus"),
    ],
)
def test_what_is_somebody_elses_is_refused_by_name(use: Callable[[Path], Any], sentence: str, tmp_path: Path) -> None:
    for name in ("texts", "theirs", "mine"):
        (tmp_path / name).mkdir()
    (tmp_path / "texts/mine.txt").touch(mode=0o000)
    (tmp_path / "theirs/a.txt").write_text("text")
    (tmp_path / "mine").chmod(0o000)
    me = os.geteuid()
    if me == 0:  # whom no mode keeps out
        for folder in (tmp_path, *tmp_path.parents[:3]):
            if not folder.stat().st_mode & 0o001:  # closed to whom the test becomes
                folder.chmod(0o755)
        os.seteuid(65534)
    try:
        with pytest.raises(Refused, match=sentence):
            use(tmp_path)
    finally:
        os.seteuid(me)
        (tmp_path / "mine").chmod(0o755)  # so that it can be removed


@pytest.mark.parametrize(
    "name", ["a.gz", "a.txt.gz", "a.jsonl.zst", "a.json.bz2", "A.JSONL.GZ", "a.zip", "a.tar.xz", "a.arrow"]
)
def test_what_holds_no_plain_text_is_refused_by_name(name: str) -> None:
    with pytest.raises(Refused, match=rf"{name} holds no plain text"):
        open_files("texts", Files([File("a.jsonl.gz", "a.jsonl.gz", 9, 0), File(name, name, 9, 0)]), "text", 64)
