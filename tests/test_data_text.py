"""Which files a source means, how they are cut into work, which documents they hold and which are held out."""

from __future__ import annotations

import json
from collections import Counter
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.schema import Refused
from data import text
from data.split import HeldOut
from data.text import Digest, File, Piece, cut, list_files, read_documents


@given(
    st.lists(st.one_of(st.text(st.characters(codec="utf-8"), max_size=30), st.binary(max_size=30)), max_size=30),
    st.lists(st.integers(0, 900), max_size=8),
)
def test_cut_lines_are_read_once_wherever_they_are_cut(
    tmp_path_factory: pytest.TempPathFactory, records: list[str | bytes], cuts: list[int]
) -> None:
    """Pieces that join to the file give the documents and the counts of the file in one piece."""
    lines = [json.dumps({"text": r}).encode() if isinstance(r, str) else r.replace(b"\n", b"") for r in records]
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    size = path.stat().st_size

    def read(borders: list[int]) -> tuple[list[tuple[int, str]], Counter[str], int]:
        skipped: Counter[str] = Counter()
        digest = Digest()
        found = []
        for begin, end in pairwise(borders):
            found += list(read_documents(Piece("a", str(path), begin, end, True), "text", skipped, digest))
        return found, skipped, digest.total

    whole = read([0, size])
    assert read([0, *sorted(c for c in cuts if c < size), size]) == whole
    assert read([0, *accumulate(len(line) + 1 for line in lines[:-1]), size]) == whole, "cut where lines begin"
    assert [t for _, t in whole[0]] == [r for r in records if isinstance(r, str) and r.strip()]


@given(st.lists(st.tuples(st.integers(0, 5 << 20), st.booleans()), min_size=1, max_size=12))
def test_parts_of_work_cover_each_file_once(files: list[tuple[int, bool]]) -> None:
    listed = [File(f"{i}.jsonl" if is_lines else f"{i}", "", size, 0) for i, (size, is_lines) in enumerate(files)]
    pieces = [piece for part in cut(listed) for piece in part]
    for file in listed:
        mine = [piece for piece in pieces if piece.name == file.name]
        assert [piece.begin for piece in mine] == [0, *(piece.end for piece in mine[:-1])]
        assert mine[-1].end == file.size
        assert file.is_lines or len(mine) == 1
    assert [p.name for p in pieces] == sorted((p.name for p in pieces), key=lambda name: int(name.split(".")[0]))


@given(st.lists(st.text(min_size=1), min_size=2, max_size=60, unique=True), st.floats(0.001, 0.999))
def test_both_sides_get_a_file_and_the_choice_is_the_files_own(names: list[str], share: float) -> None:
    names = [name.encode(errors="replace").decode() for name in names]
    if len(set(names)) < 2:
        return
    held_out = HeldOut.choose(share, "file", names)
    sides = {name: held_out.split(name, 0) for name in names}
    assert set(sides.values()) == {"train", "valid"}
    assert HeldOut.choose(share, "file", names[::-1]) == held_out
    assert all(held_out.split(name, 7) == side for name, side in sides.items()), "a file goes to one side whole"


def test_shares_are_held_out_as_asked() -> None:
    names = [f"file {i}" for i in range(20_000)]
    for share in (0.05, 0.5):
        for held_out in (HeldOut.choose(share, "file", names), HeldOut.choose(share, "document", names)):
            found = sum(held_out.split(name, 3) == "valid" for name in names)
            assert abs(found - share * len(names)) < 5 * (share * len(names)) ** 0.5
    assert {HeldOut.choose(0.0, "file", names).split(name, 0) for name in names} == {"train"}
    assert HeldOut.choose(0.9, "file", names[:1]).split(names[0], 0) == "train", "a lone file is trained on"


def test_the_standard_library_is_its_source_without_tests() -> None:
    files = list_files(text.STDLIB)
    names = {file.name for file in files}
    assert {"ast.py", "json/decoder.py"} <= names
    assert not any(set(name.split("/")) & {"test", "tests", "site-packages"} for name in names)
    assert sum(file.size for file in files) > 5_000_000
    assert files == list_files(text.STDLIB)


def test_a_glob_names_files_from_where_it_begins(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for name in ("1", "00", "02.txt", "01.txt", "12.txt"):
        (tmp_path / "texts" / name).touch()
    names = [file.name for file in list_files(f"{tmp_path}/te*/0*.txt")]
    assert names == ["texts/01.txt", "texts/02.txt"]


def test_a_file_too_large_for_one_document_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MAX_FILE", 3)
    (tmp_path / "a.txt").write_text("four")
    with pytest.raises(Refused, match="make it JSONL"):
        list_files(str(tmp_path))
