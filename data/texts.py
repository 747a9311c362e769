"""Where text comes from: the keys that say so, shared by every command that reads text."""

from __future__ import annotations

from dataclasses import dataclass, field

from conf.schema import Refused
from data.files import list_files
from data.portions import open_files
from data.records import Texts

DATASETS = "datasets:"
PARQUET = ".parquet"


@dataclass(frozen=True)
class TextSource:
    """Files, or whatever the `datasets` library opens. The keys behind `rows` are those of `datasets.load_dataset`."""

    source: str = field(
        metadata={
            "help": "'stdlib' (this Python's own standard library), a file, a folder or a glob, where *.jsonl and "
            "*.jsonl.gz are JSONL and *.parquet Parquet; or datasets:NAME, where NAME is a builder (json, csv, …), a "
            "name on the hub or a folder that save_to_disk wrote"
        }
    )
    text_key: str = field(default="text", kw_only=True, metadata={"help": "key or column of the text"})
    max_document: int = field(
        default=4 << 20, kw_only=True, metadata={"help": "bytes; a longer document becomes several, which is counted"}
    )
    rows: int | None = field(
        default=None, kw_only=True, metadata={"help": "read only so many first rows of a dataset, in one process"}
    )
    subset: str | None = field(default=None, kw_only=True, metadata={"help": "of a dataset (load_dataset's `name`)"})
    data_files: str | None = field(default=None, kw_only=True, metadata={"help": "file or glob, for datasets:BUILDER"})
    split: str | None = field(default=None, kw_only=True, metadata={"help": "of a dataset; null: train"})
    streaming: bool = field(
        default=False, kw_only=True, metadata={"help": "read a dataset as it comes, without a copy on this disk"}
    )

    def __post_init__(self) -> None:
        if self.max_document < 64:
            raise ValueError(f"max_document is {self.max_document}, but at least 64 bytes are needed.")
        if self.rows is not None and self.rows < 1:
            raise ValueError(f"rows is {self.rows}, but at least 1 is needed.")
        of_datasets = {
            "subset": self.subset,
            "data_files": self.data_files,
            "split": self.split,
            "streaming": self.streaming or None,
        }
        given = [key for key, value in of_datasets.items() if value is not None]
        if given and not self.source.startswith(DATASETS):
            raise ValueError(f"{', '.join(given)} says how a dataset is opened; give source=datasets:NAME with it.")

    def open(self) -> Texts:
        """List the source without reading it. Raises Refused where it cannot be used."""
        if self.source.startswith(DATASETS):
            from data.rows import Rows, open_rows

            name = self.source.removeprefix(DATASETS)
            how = (self.subset, self.data_files, self.split or "train", self.streaming, self.rows)
            return open_rows(Rows(name, *how, self.text_key, self.max_document))
        files = list_files(self.source)
        if any(file.name.endswith(PARQUET) for file in files):
            if other := next((file.name for file in files if not file.name.endswith(PARQUET)), None):
                raise Refused(f"{self.source} holds Parquet and other files ({other}); name one kind by a glob.")
            from data.rows import open_parquet

            return open_parquet(self.source, files, self.rows, self.text_key, self.max_document)
        if self.rows is not None:
            raise Refused("rows counts the rows of a dataset or of Parquet; leave it out for text files and JSONL.")
        return open_files(self.source, files, self.text_key, self.max_document)
