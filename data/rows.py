"""Rows of anything that the `datasets` library opens: a builder, a hub name, a saved dataset, Parquet; also streamed.

Whatever it is becomes a stream, a portion of it is what the library calls a shard, and only the rows in hand are in
memory.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import pickle
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from conf.schema import Refused
from data.files import File, Files, check_unchanged, describe, list_files
from data.records import NO_TEXT, PORTION, Record, place_digest, records

ROWS = 256  # rows asked of the library at once


@dataclass(frozen=True)
class RowPortion:
    """One of `of` consecutive portions of a stream of rows; `of` is 0 where the stream is one portion."""

    stream: bytes
    index: int
    of: int
    text_key: str
    max_document: int

    def records(self) -> Iterator[Record]:
        """The rows' texts, read as bytes: Arrow does not check that text is UTF-8, and one bad row would fail all."""
        stream = _unpickle(self.stream)
        shard = stream.shard(self.of, self.index) if self.of else stream
        for table in shard.with_format("arrow").iter(batch_size=ROWS):
            column = table.column(self.text_key) if self.text_key in table.column_names else pa.nulls(len(table))
            if pa.types.is_dictionary(column.type):
                column = column.cast(column.type.value_type)
            is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
            for value in column:
                if not is_text or not value.is_valid:
                    yield Record("", None, NO_TEXT, 0, place_digest("", 0, b""))
                else:
                    content = value.as_buffer().to_pybytes()
                    yield from records(content, self.max_document, file="", digest=place_digest("", 0, content))


@dataclass(frozen=True)
class RowTexts:
    """`of` portions of a stream of rows, as Texts; `of` is 0 where the stream is one portion.

    files: those that it was listed from, where it was not the library that found them.
    """

    name: str
    fingerprint: str
    plan: str
    size: int | None
    stream: bytes
    of: int
    text_key: str
    max_document: int
    files: Iterable[File]
    many = True

    def names(self) -> Iterator[str]:
        return iter(())

    def portions(self) -> Iterator[RowPortion]:
        for index in range(max(self.of, 1)):
            yield RowPortion(self.stream, index, self.of, self.text_key, self.max_document)

    def check_unchanged(self) -> None:
        for file in self.files:
            check_unchanged(file.path, file.size, file.modified, os.stat(file.path))


@dataclass(frozen=True)
class Rows:
    """What to open. name: as `datasets.load_dataset` takes it, or a folder that `save_to_disk` wrote."""

    name: str
    subset: str | None
    data_files: str | None
    split: str
    streaming: bool
    rows: int | None
    text_key: str
    max_document: int


def open_rows(asked: Rows) -> RowTexts:
    """Raises Refused where the library cannot open it or there is no such split or column."""
    _quieten()
    if _is_saved(Path(asked.name)):
        stored = _try(asked.name, lambda: datasets.load_from_disk(asked.name))
        if isinstance(stored, datasets.DatasetDict):
            _check_split(asked, list(stored))
            stored = stored[asked.split]
        files = list_files(asked.name)
        return _texts(asked, describe(asked.name), stored, files.fingerprint(), files)
    builder = _try(
        asked.name, lambda: datasets.load_dataset_builder(asked.name, asked.subset, data_files=asked.data_files)
    )
    found = builder.config.data_files or {}
    facts = [builder.dataset_name, builder.config.name, asked.split]
    facts += [[str(split), list(files), list(files.origin_metadata)] for split, files in found.items()]
    fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return _texts(asked, " ".join(filter(None, [asked.name, asked.subset])), _open(asked, builder), fingerprint)


def open_parquet(source: str, files: Files, rows: int | None, text_key: str, max_document: int) -> RowTexts:
    """Parquet files, each row group a portion, of which the text column alone is read."""
    _quieten()
    paths = [glob.escape(file.path) for file in files]  # the library takes each for a pattern
    builder = _try(
        source,
        lambda: datasets.load_dataset_builder("parquet", data_files=paths, columns=[text_key], batch_size=ROWS),
    )
    asked = Rows(source, None, None, "train", True, rows, text_key, max_document)
    try:
        stream = _open(asked, builder).reshard()
    except ValueError as error:
        raise Refused(f"source {source} has no column '{text_key}' ({error}); give text_key=COLUMN.") from None
    return _texts(asked, describe(source), stream, files.fingerprint(), files)


def _texts(asked: Rows, name: str, found: Any, fingerprint: str, files: Iterable[File] = ()) -> RowTexts:
    if found.column_names is not None and asked.text_key not in found.column_names:
        columns = ", ".join(found.column_names)
        raise Refused(f"{asked.name} has no column '{asked.text_key}' but {columns}; give text_key=COLUMN.")
    size = None
    if hasattr(found, "to_iterable_dataset"):
        found = found.select_columns([asked.text_key])
        if not len(found):
            raise Refused(f"split '{asked.split}' of {asked.name} has no row.")
        size = found.data.nbytes
        found = found.to_iterable_dataset(num_shards=min(max(size // PORTION, 1), len(found)))
    elif found.column_names is not None:
        found = found.select_columns([asked.text_key])
    of = 0
    if asked.rows is not None:
        found = found.take(asked.rows)  # of the first shards: a stream that ends there cannot be cut into shards
    else:
        of = found.num_shards
    stream = pickle.dumps(found)
    plan = hashlib.sha256(json.dumps([of, [file.modified for file in files]]).encode()).hexdigest()
    size = size if of else None
    return RowTexts(name, fingerprint, plan, size, stream, of, asked.text_key, asked.max_document, files)


def _open(asked: Rows, builder: Any) -> Any:
    if builder.info.splits:
        _check_split(asked, list(builder.info.splits))
    if asked.streaming:
        splits = _try(asked.name, builder.as_streaming_dataset)
        _check_split(asked, list(splits))
        return splits[asked.split]
    _try(asked.name, builder.download_and_prepare)
    _check_split(asked, list(builder.info.splits))
    return builder.as_dataset(split=asked.split)


def _check_split(asked: Rows, splits: list[Any]) -> None:
    if asked.split not in map(str, splits):
        raise Refused(f"{asked.name} has no split '{asked.split}'; choose one of {', '.join(map(str, splits))}.")


def _try(name: str, action: Any) -> Any:
    """The library raises errors of many kinds for what it cannot open; disk and memory are no fault of the input."""
    try:
        return action()
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:
        for each in (error, error.__cause__):
            if isinstance(each, OSError) and each.errno is not None and not isinstance(each, FileNotFoundError):
                raise each from None
        reasons = [" ".join(str(each).split()).rstrip(".") for each in (error, error.__cause__) if each is not None]
        said = ": ".join(filter(None, reasons)) or type(error).__name__
        raise Refused(f"datasets cannot open '{name}': {said}.") from None


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _quieten() -> None:
    """The library's bars are for somebody who watches."""
    datasets.utils.logging.set_verbosity(logging.ERROR)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


@lru_cache(maxsize=1)
def _unpickle(stream: bytes) -> Any:
    _quieten()
    return pickle.loads(stream)
