"""How fast data is read and prepared, on this machine."""

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
from dataclasses import dataclass, field
from multiprocessing import forkserver
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
    """Seconds of each from a fresh process and an empty folder, so that neither profits from a cache."""
    runs: dict[str, list[Stages]] = {"prepare": [], "datasets": []}
    for _ in range(request.repeats):
        for name, measured in runs.items():
            measured.append(_fresh_process(name, request))
    tokens = {int(run.pop("tokens")[0]) for measured in runs.values() for run in measured}
    if len(tokens) != 1:
        raise RuntimeError(f"the two did not make as many tokens: {sorted(tokens)}")
    lines = [f"{tokens.pop():,} tokens, {request.processes} processes, medians of {request.repeats} runs"]
    for name, measured in runs.items():
        stages = []
        for stage in measured[0]:
            wall, cpu = (statistics.median(run[stage][i] for run in measured) for i in range(2))
            stages.append(f"{stage} {wall:.2f} s (cpu {cpu:.2f} s)")
        lines.append(f"{name:9} {', '.join(stages)}")
    return "\n".join(lines)


Stages = dict[str, tuple[float, float]]  # seconds by the wall, seconds of all processes' CPU


def _fresh_process(name: str, request: BenchPrepare) -> Stages:
    arguments = [sys.executable, "-m", "data.bench", name, json.dumps(dataclasses.asdict(request))]
    return json.loads(subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True).stdout)


class _Clock:
    """Seconds between laps. CPU seconds count workers that have ended, and do not grow when others use the machine."""

    def __init__(self) -> None:
        self.stages: Stages = {}
        self._last = self._now()

    def lap(self, stage: str) -> None:
        now = self._now()
        self.stages[stage] = (now[0] - self._last[0], now[1] - self._last[1])
        self._last = now

    @staticmethod
    def _now() -> tuple[float, float]:
        who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        return time.perf_counter(), sum(sum(resource.getrusage(each)[:2]) for each in who)


def _time_prepare(request: BenchPrepare) -> Stages:
    """`import` is megatron-core's, which a run does while its workers tokenize; `work` is the rest, with reading."""
    clock = _Clock()
    indexed_dataset()
    clock.lap("import")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "corpus")
        prepare(
            Prepare(request.source, str(out), request.tokenizer, request.end_of_document, processes=request.processes)
        )
        forkserver._forkserver._stop()  # type: ignore[attr-defined]  # its workers' CPU seconds count once it has ended
        clock.lap("work")
        splits = Manifest.read(out).splits.values()
    return clock.stages | {"tokens": (sum(split.tokens for split in splits), 0)}


def _time_datasets(request: BenchPrepare) -> Stages:
    """`load` turns files into Arrow; `map` is that alone."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    clock = _Clock()
    import datasets

    datasets.disable_progress_bars()
    clock.lap("import")
    with tempfile.TemporaryDirectory() as folder:
        files = [file.path for file in list_files(request.source)]
        loaded = datasets.load_dataset(
            "text", data_files=files, sample_by="document", split="train", cache_dir=folder, keep_linebreaks=True
        )
        clock.lap("load")
        encode = _Encode(request.tokenizer, request.end_of_document)
        mapped = loaded.map(encode, batched=True, remove_columns=["text"], num_proc=request.processes)
        clock.lap("map")
        tokens = sum(mapped["length"])
    return clock.stages | {"tokens": (tokens, 0)}


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
    timed = {"prepare": _time_prepare, "datasets": _time_datasets}[sys.argv[1]]
    print(json.dumps(timed(BenchPrepare(**json.loads(sys.argv[2])))))
