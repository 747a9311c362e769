"""How fast data is read and prepared, on this machine."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.manifest import Manifest
from data.megatron import indexed_dataset
from data.part import token_type
from data.prepare import Prepare, prepare
from data.text import list_files
from data.tokenizer import open_tokenizer


@dataclass(frozen=True)
class Bench:
    """Tokens a second that one core reads from a prepared corpus as ready batches, nothing else running."""

    path: str = field(metadata={"help": "folder that `python -m data prepare` wrote"})
    sequence_length: int = field(default=2048, metadata={"help": "inputs a window"})
    num_samples: int = field(default=32, metadata={"help": "windows a batch"})
    depth: int = field(default=0, metadata={"help": "further targets an input"})
    seconds: float = field(default=5.0, metadata={"help": "how long to measure"})


def bench(request: Bench) -> str:
    """Raises Refused where the corpus cannot be read."""
    import torch

    from data.corpus import Config
    from data.loader import Loader

    torch.set_num_threads(1)
    source = Config(request.path).open()
    loader = Loader(source, sequence_length=request.sequence_length, depth=request.depth)
    loader.batch(0, request.num_samples)
    batches = 0
    began, began_cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() - began < request.seconds:
        loader.batch(batches * request.num_samples, request.num_samples)
        batches += 1
    wall, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    tokens = batches * request.num_samples * request.sequence_length
    epochs = tokens / source.num_tokens
    return (
        f"{tokens / cpu / 1e6:.1f} M tokens a second and core, {tokens / wall / 1e6:.1f} M a second "
        f"({batches} batches of {request.num_samples} × {request.sequence_length}, {epochs:.1f} epochs, "
        f"in {wall:.1f} s of one thread)"
    )


@dataclass(frozen=True)
class BenchPrepare:
    """`prepare` beside `datasets.map`: the same text, tokenizer and number of processes, to files on disk."""

    source: str = field(default="stdlib", metadata={"help": "as in prepare"})
    tokenizer: str = field(default="bytes", metadata={"help": "as in prepare"})
    end_of_document: str | None = field(default=None, metadata={"help": "as in prepare"})
    processes: int = field(default=2, metadata={"help": "worker processes of each"})
    repeats: int = field(default=3, metadata={"help": "times each is run, in turn; the median of each counts"})


def bench_prepare(request: BenchPrepare) -> str:
    """Two lines of seconds. Each run is a fresh process and an empty folder, so neither profits from a cache."""
    runs: dict[str, list[dict[str, float]]] = {"prepare": [], "datasets.map": []}
    for _ in range(request.repeats):
        for name, measured in runs.items():
            measured.append(_fresh_process(name, request))
    tokens = {int(run["tokens"]) for measured in runs.values() for run in measured}
    if len(tokens) != 1:
        raise RuntimeError(f"the two did not make as many tokens: {sorted(tokens)}")
    count = tokens.pop()
    lines = [f"{count:,} tokens, {request.processes} processes, medians of {request.repeats} runs"]
    for name, measured in runs.items():
        seconds = {key: statistics.median(run[key] for run in measured) for key in ("imports", "load", "work")}
        parts = ", ".join(f"{key} {value:.2f} s" for key, value in seconds.items())
        lines.append(f"{name:13} {parts}; {count / seconds['work'] / 1e6:.2f} M tokens a second of work")
    return "\n".join(lines)


def _fresh_process(name: str, request: BenchPrepare) -> dict[str, float]:
    arguments = [sys.executable, "-m", "data.bench", name, json.dumps(dataclasses.asdict(request))]
    return json.loads(subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True).stdout)


def _time_prepare(request: BenchPrepare) -> dict[str, float]:
    """Reading the text is part of the work; only the import of megatron-core is timed apart."""
    clock = [time.perf_counter()]
    indexed_dataset()
    clock.append(time.perf_counter())
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "corpus")
        prepare(
            Prepare(request.source, str(out), request.tokenizer, request.end_of_document, processes=request.processes)
        )
        clock.append(time.perf_counter())
        splits = Manifest.read(out).splits.values()
    imports, work = np.diff(clock)
    return {"imports": imports, "load": 0.0, "work": work, "tokens": sum(split.tokens for split in splits)}


def _time_map(request: BenchPrepare) -> dict[str, float]:
    """`load` turns files into Arrow; `work` is `map` alone."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    clock = [time.perf_counter()]
    import datasets

    datasets.disable_progress_bars()
    clock.append(time.perf_counter())
    with tempfile.TemporaryDirectory() as folder:
        files = [file.path for file in list_files(request.source)]
        loaded = datasets.load_dataset(
            "text", data_files=files, sample_by="document", split="train", cache_dir=folder, keep_linebreaks=True
        )
        clock.append(time.perf_counter())
        encode = _Encode(request.tokenizer, request.end_of_document)
        mapped = loaded.map(encode, batched=True, remove_columns=["text"], num_proc=request.processes)
        clock.append(time.perf_counter())
        tokens = sum(mapped["length"])
    imports, load, work = np.diff(clock)
    return {"imports": imports, "load": load, "work": work, "tokens": tokens}


@dataclass(frozen=True)
class _Encode:
    """What `map` runs on a batch: ids of each document, ended, and how many."""

    tokenizer: str
    end_of_document: str | None

    def __call__(self, batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        tokenizer = open_tokenizer(self.tokenizer, self.end_of_document)
        kind = token_type(tokenizer.vocab)
        end = np.array([tokenizer.end_of_document], kind)
        texts = [text for text in batch["text"] if text.strip()]
        ids = [np.concatenate([encoded.astype(kind), end]) for encoded in tokenizer.encode(texts)]
        return {"ids": ids, "length": [len(i) for i in ids]}


if __name__ == "__main__":  # one timed run, in its own process
    timed = {"prepare": _time_prepare, "datasets.map": _time_map}[sys.argv[1]]
    print(json.dumps(timed(BenchPrepare(**json.loads(sys.argv[2])))))
