"""Which documents text files and JSONL hold, and what becomes of those that are none or too long."""

from __future__ import annotations

import gzip
import json
import os
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.records import EMPTY, MALFORMED, NO_TEXT, NOT_UTF8, TOO_LONG, Record, records
from data.text import Chunk, read_records

LIMIT = 64  # bytes: max_document here


def read_file(path: Path, borders: list[int], limit: int = LIMIT) -> list[Record]:
    """The records of a file cut at `borders`."""
    facts = path.stat()
    file = ("a", str(path), facts.st_size, facts.st_mtime_ns)
    is_lines = ".jsonl" in path.name
    chunks = [Chunk(*file, begin, end, is_lines, path.suffix == ".gz") for begin, end in pairwise(borders)]
    return [record for chunk in chunks for record in read_records(chunk, "text", limit)]


def multiples(size: int, limit: int = LIMIT) -> list[int]:
    return [*range(0, max(size, 1), limit), size]


@given(
    st.lists(
        st.one_of(st.text(st.characters(codec="utf-8"), max_size=LIMIT // 4), st.binary(max_size=30)), max_size=30
    ),
    st.lists(st.integers(0, 900), max_size=8),
)
def test_cut_lines_are_read_once_wherever_they_are_cut(
    tmp_path_factory: pytest.TempPathFactory, written: list[str | bytes], cuts: list[int]
) -> None:
    """Chunks that join to the file give the documents and the counts of the file as one."""
    lines = [json.dumps({"text": r}).encode() if isinstance(r, str) else r.replace(b"\n", b"") for r in written]
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    size = path.stat().st_size

    def read(borders: list[int]) -> tuple[list[Record], int]:
        found = read_file(path, borders)
        return [r for r in found if r.text is not None or r.skipped], sum(r.digest for r in found) % 2**128

    whole = read([0, size])
    assert read([0, *sorted(c for c in cuts if c < size), size]) == whole
    assert read([0, *accumulate(len(line) + 1 for line in lines[:-1]), size]) == whole, "cut where lines begin"
    assert [r.text for r in whole[0] if r.text] == [r for r in written if isinstance(r, str) and r.strip()]
    packed = path.with_suffix(".jsonl.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_file(packed, [0, packed.stat().st_size]) == read_file(path, [0, size])


@given(st.lists(st.one_of(st.text(st.characters(codec="utf-8")), st.just("line\n"), st.text("é𐍈")), max_size=99))
def test_a_document_over_the_limit_is_cut_at_the_same_places_in_a_file_and_in_memory(
    tmp_path_factory: pytest.TempPathFactory, written: list[str]
) -> None:
    """The chunks join to the whole, none is much over the limit, and no character is lost at a border."""
    text = "x" + "".join(written).replace("\r", "") + "x"
    content = text.encode()
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(content)
    filed = read_file(path, multiples(len(content)))
    in_memory = list(records(content, LIMIT, file="a", digest=0))
    assert [r.text for r in filed] == [r.text for r in in_memory]
    assert [r.cut for r in filed] == [r.cut for r in in_memory]
    assert sum(r.cut for r in filed) == (len(content) > LIMIT)
    assert len({r.document for r in filed}) == 1, "held out together"
    assert NOT_UTF8 not in {r.skipped for r in filed}
    if EMPTY not in {r.skipped for r in filed}:
        assert "".join(r.text or "" for r in filed) == text
    assert all(len((r.text or "").encode()) <= 2 * LIMIT for r in filed)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        pytest.param("a.txt", b"", [EMPTY], id="empty-file"),
        pytest.param("a.txt", b" \n\t", [EMPTY], id="white-space"),
        pytest.param("a.txt", b"\xef\xbb\xbftext", ["text"], id="byte-order-mark"),
        pytest.param("a.txt", b"a\r\nb", ["a\r\nb"], id="line-ends-as-they-are"),
        pytest.param("a.txt", b"na\xefve", [NOT_UTF8], id="latin-1"),
        pytest.param("a.txt", b"x" * LIMIT, ["x" * LIMIT], id="as-long-as-the-limit"),
        pytest.param("a.txt", b"x" * (LIMIT + 1), ["x" * LIMIT, "x"], id="one-byte-over-the-limit"),
        pytest.param("a.txt", b"x" * LIMIT + b"\xff", ["x" * LIMIT, NOT_UTF8], id="a-bad-byte-spoils-its-chunk-alone"),
        pytest.param("a.txt", b"\x80" * (3 * LIMIT), [NOT_UTF8] * 3, id="no-character-at-any-border"),
        pytest.param("a.jsonl", b"\n\n \n", [], id="blank-lines"),
        pytest.param("a.jsonl", b'{"text": "a"}', ["a"], id="no-newline-at-the-end"),
        pytest.param("a.jsonl", b'{"text": "a"}\r\n', ["a"], id="windows-newline"),
        pytest.param("a.jsonl", b'{"text": "a"', [MALFORMED], id="cut-line"),
        pytest.param("a.jsonl", b'["a"]', [MALFORMED], id="no-object"),
        pytest.param("a.jsonl", b"[" * 400, [MALFORMED], id="deep-nesting"),
        pytest.param("a.jsonl", b'{"text": ' + b"9" * 400 + b"}", [NO_TEXT], id="a-large-number"),
        pytest.param("a.jsonl", b'{"text": null}', [NO_TEXT], id="null"),
        pytest.param("a.jsonl", b'{"body": "a"}', [NO_TEXT], id="another-key"),
        pytest.param("a.jsonl", b'{"text": " "}', [EMPTY], id="blank-text"),
        pytest.param("a.jsonl", b'{"text": ""}', [EMPTY], id="empty-text"),
        pytest.param("a.jsonl", b'{"text": "\xff"}', [NOT_UTF8], id="bad-byte"),
        pytest.param("a.jsonl", b'{"text": "\\ud800"}', [NOT_UTF8], id="half-a-surrogate-pair"),
        pytest.param("a.jsonl", b'{"text": "%s"}' % (b"x" * LIMIT + b"y"), ["x" * LIMIT, "y"], id="long-text"),
        pytest.param("a.jsonl", b" " * (8 * LIMIT - 13) + b'{"text": "a"}\n', ["a"], id="longest-line"),
        pytest.param("a.jsonl", b" " * (8 * LIMIT - 12) + b'{"text": "a"}\n', [TOO_LONG], id="too-long-line"),
        pytest.param("a.jsonl", b" " * (99 * LIMIT) + b'\n{"text": "a"}', [TOO_LONG, "a"], id="behind-a-too-long-line"),
    ],
)
def test_each_rule(name: str, content: bytes, expected: list[str], tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    borders = [0, len(content)] if ".jsonl" in name else multiples(len(content))
    found = read_file(path, borders)
    assert [r.text or r.skipped for r in found if r.text or r.skipped] == expected


@pytest.mark.parametrize(
    "content", [pytest.param("longer than it was", id="another-size"), pytest.param("new", id="the-same-size")]
)
def test_a_file_that_changed_is_not_read(content: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(content)
    listed = path.stat().st_mtime_ns - 1
    with pytest.raises(OSError, match=r"a\.txt changed while it was read"):
        list(read_records(Chunk("a", str(path), 3, listed, 0, 3, False), "text", LIMIT))


def test_a_file_that_changes_while_it_is_read_is_noticed_at_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' * 2)
    facts = path.stat()
    chunk = Chunk("a", str(path), facts.st_size, facts.st_mtime_ns, 0, facts.st_size, True)
    reading = read_records(chunk, "text", LIMIT)
    next(reading)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    with pytest.raises(OSError, match=r"a\.jsonl changed while it was read"):
        list(reading)


PACKED = gzip.compress(b'{"text": "a"}\n' * 1000)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(PACKED[:-20], id="cut-short"),
        pytest.param(PACKED[:-8] + bytes(8), id="another-checksum"),
        pytest.param(PACKED[:10] + b"\xff" * 40 + PACKED[50:], id="damaged-stream"),
    ],
)
def test_a_damaged_gzip_file_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(OSError, match=r"a\.jsonl\.gz is a damaged gzip file"):
        read_file(path, [0, path.stat().st_size])
