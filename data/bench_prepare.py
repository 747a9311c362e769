"""How fast text is prepared, on this machine, beside `datasets.map`."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, Literal

import numpy as np

from conf.schema import Refused
from data.manifest import Manifest
from data.part import token_type
from data.prepare import Prepare, prepare
from data.texts import TextSource
from data.tokenizer import HuggingFace, open_tokenizer

Form = Literal["jsonl", "parquet"]
ROW_GROUP = 8 << 20  # bytes of text


@dataclass(frozen=True)
class BenchPrepare(TextSource):
    """`prepare` beside `datasets.map`: the same file, tokenizer and number of processes, to files on disk.

    The file holds the source's documents as `prepare` finds them; it is made first, outside all clocks.
    """

    form: Form = field(default="jsonl", metadata={"help": "of the file: 'jsonl' or 'parquet'"})

    tokenizer: str = field(default="bytes", metadata={"help": "as in prepare"})
    end_of_document: str | None = field(default=None, metadata={"help": "as in prepare"})
    processes: int = field(default=2, metadata={"help": "worker processes of each"})
    repeats: int = field(default=3, metadata={"help": "times each is run, in turn; the median of each counts"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.processes, self.repeats) < 1:
            raise ValueError(f"processes is {self.processes} and repeats {self.repeats}, but at least 1 is needed.")


def bench_prepare(request: BenchPrepare) -> str:
    """Seconds of each from a fresh process and an empty folder, so that neither profits from a cache.

    Raises Refused where the source cannot be used, RuntimeError where the two do not make as many tokens.
    """
    # refused here, not where it is timed
    _ = open_tokenizer(request.tokenizer, request.end_of_document).end_of_document
    runs: dict[str, list[Run]] = {"prepare": [], "datasets": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"texts.{request.form}")
        documents, num_bytes = _write(request, path)
        if not documents:
            raise Refused(f"{request.source} holds no document; name a source that does.")
        timed = BenchPrepare(  # of the keys that say where text comes from, only the limit holds for what is there now
            str(path),
            max_document=request.max_document,
            form=request.form,
            tokenizer=request.tokenizer,
            end_of_document=request.end_of_document,
            processes=request.processes,
        )
        for _ in range(request.repeats):
            for name, measured in runs.items():
                measured.append(_fresh_process(name, timed))
    tokens = {run.tokens for measured in runs.values() for run in measured}
    if len(tokens) != 1:
        raise RuntimeError(f"the two did not make as many tokens: {sorted(tokens)}")
    count = tokens.pop()
    load = os.getloadavg()[1] if hasattr(os, "getloadavg") else float("nan")
    lines = [
        f"{documents:,} documents, {num_bytes:,} bytes, {count:,} tokens; {request.processes} processes on "
        f"{os.cpu_count()} cores, load {load:.1f} over the last 5 minutes; medians of {request.repeats} runs"
    ]
    for name, measured in runs.items():
        stages = []
        seconds = 0.0
        for stage in measured[0].stages:
            wall, cpu = (statistics.median(run.stages[stage][i] for run in measured) for i in range(2))
            stages.append(f"{stage} {wall:.2f} s (cpu {cpu:.2f} s)")
            seconds += cpu if stage != "import" else 0
        peak = statistics.median(run.peak for run in measured) / 1024
        lines.append(
            f"{name:9} {', '.join(stages)}; {count / seconds:,.0f} tokens a CPU second without imports; "
            f"largest process {peak:,.0f} MiB"
        )
    return "\n".join(lines)


@dataclass(frozen=True)
class Run:
    """stages: seconds by the wall and of all processes' CPU. peak: KiB resident in the largest process."""

    stages: dict[str, tuple[float, float]]
    tokens: int
    peak: int


def _write(request: BenchPrepare, path: Path) -> tuple[int, int]:
    """How many documents, and their bytes."""
    documents = num_bytes = 0
    with _open_writer(path, request.form) as write:
        for texts in _groups(request):
            write(texts)
            documents += len(texts)
            num_bytes += sum(len(text.encode()) for text in texts)
    return documents, num_bytes


@contextmanager
def _open_writer(path: Path, form: Form) -> Iterator[Callable[[list[str]], None]]:
    """What writes some texts; to Parquet as a row group."""
    if form == "jsonl":
        with path.open("w") as file:
            yield lambda texts: file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        return
    import pyarrow as pa
    from pyarrow import parquet

    schema = pa.schema({"text": pa.string()})
    with parquet.ParquetWriter(path, schema) as writer:
        yield lambda texts: writer.write_table(pa.table({"text": texts}, schema))


def _groups(request: BenchPrepare) -> Iterator[list[str]]:
    texts: list[str] = []
    filled = 0
    for portion in request.open().portions():
        for record in portion.records():
            if record.text is not None:
                texts.append(record.text)
                filled += len(record.text)
            if filled >= ROW_GROUP:
                yield texts
                texts, filled = [], 0
    if texts:
        yield texts


def _fresh_process(name: str, request: BenchPrepare) -> Run:
    arguments = [sys.executable, "-m", "data.bench_prepare", name, json.dumps(dataclasses.asdict(request))]
    return Run(**json.loads(subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True).stdout))


class _Clock:
    """Seconds between laps. CPU seconds count workers that have ended, and do not grow when others use the machine."""

    def __init__(self) -> None:
        self.stages: dict[str, tuple[float, float]] = {}
        self._last = self._now()

    def lap(self, stage: str) -> None:
        now = self._now()
        self.stages[stage] = (now[0] - self._last[0], now[1] - self._last[1])
        self._last = now

    def run(self, tokens: int) -> Run:
        peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return Run(self.stages, tokens, peak)

    @staticmethod
    def _now() -> tuple[float, float]:
        who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        return time.perf_counter(), sum(sum(resource.getrusage(each)[:2]) for each in who)


def _time_prepare(request: BenchPrepare) -> Run:
    clock = _Clock()
    if request.form == "parquet":
        import datasets  # noqa: F401  # reads the file for prepare too
    clock.lap("import")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "corpus")
        common = {f.name: getattr(request, f.name) for f in dataclasses.fields(TextSource)}
        how = {name: getattr(request, name) for name in ("tokenizer", "end_of_document", "processes")}
        prepare(Prepare(out=str(out), **common, **how))
        forkserver._forkserver._stop()  # type: ignore[attr-defined]  # its workers' CPU seconds count once it has ended
        clock.lap("prepare")
        splits = Manifest.read(out).splits.values()
    return clock.run(sum(split.tokens for split in splits))


def _time_datasets(request: BenchPrepare) -> Run:
    """`load` turns the file into Arrow; `map` is that alone."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    clock = _Clock()
    import datasets

    datasets.disable_progress_bars()
    clock.lap("import")
    with tempfile.TemporaryDirectory() as folder:
        reader = {"jsonl": "json", "parquet": "parquet"}[request.form]
        loaded = datasets.load_dataset(reader, data_files=request.source, split="train", cache_dir=folder)
        clock.lap("load")
        encode = _Encode(request.tokenizer, request.end_of_document)
        mapped = loaded.map(encode, batched=True, batch_size=100, remove_columns=["text"], num_proc=request.processes)
        clock.lap("map")
        tokens = sum(mapped["length"])
    return clock.run(tokens)


@dataclass(frozen=True)
class _Encode:
    """What `map` runs on a batch: ids of each document, ended, and how many. The library's own encoding of a batch, not
    ours of long documents in pieces, which is quicker."""

    tokenizer: str
    end_of_document: str | None

    def __call__(self, batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        tokenizer = open_tokenizer(self.tokenizer, self.end_of_document)
        kind = token_type(tokenizer.vocab)
        end = np.array([tokenizer.end_of_document], kind)
        if isinstance(tokenizer, HuggingFace):
            encoded = tokenizer.library.encode_batch_fast(batch["text"], add_special_tokens=False)
            made = [np.array(each.ids, kind) for each in encoded]
        else:
            made = [each.astype(kind) for each in tokenizer.encode(batch["text"])]
        ids = [np.concatenate([each, end]) for each in made]
        return {"ids": ids, "length": [len(i) for i in ids]}


if __name__ == "__main__":  # one timed run, in its own process
    timed = {"prepare": _time_prepare, "datasets": _time_datasets}[sys.argv[1]]
    print(json.dumps(dataclasses.asdict(timed(BenchPrepare(**json.loads(sys.argv[2]))))))
