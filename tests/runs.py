"""Runs of `train` in a test: real processes, which can be killed, told to stop, and started again.

They are forked from the server of tests/ranks.py, where everything slow to import is imported already, and then do what
`python -m train` does with the same arguments. Ranks get the variables that torchrun gives.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.checkpoint import Files, read_table
from tests import forked
from tests.corpora import write_corpus
from tests.ports import free_ports
from tests.ranks import PATIENCE

MODEL = (
    "run.threads=1", "run.device=cpu", "model.width=16", "model.vocab=64", "attention.heads=2", "attention.kv_heads=1",
    "attention.head_dim=8", "moe.experts=4", "moe.hidden=8", "moe.shared_hidden=8", "train.sequence_length=8",
    "train.batch_tokens=64", "train.micro_batch=3", "train.steps=16", "schedule.warmup_steps=3", "checkpoint.every=4",
    "optimizer.learning_rate=3e-3", "evaluate.every=6", "evaluate.samples=4", "log.every=1",
    "model.layers=[{repeat: 2, of: [{attention: ${attention}, feedforward: ${moe}}]}]",
)  # fmt: skip
TINY = (*MODEL, "data.train.path=corpus", "data.validation.split=train")
"""Overrides for a run of seconds on the corpus that `write_text` makes; two layers with a mixture of experts."""

MTP = "+model.mtp={scheme:concat,depth:1,layer:{attention:${attention},feedforward:${moe}}}"
"""Gives such a run multi-token prediction."""

TASK = (
    *MODEL, "data=recall", "data.train.num_pairs=2", "data.train.num_queries=1", "data.train.num_keys=16",
    "data.train.num_values=16",
)  # fmt: skip
"""The same on a task that needs no corpus, whose reader takes seconds to import: for runs in interpreters of their own
that are not about data."""


def write_text(folder: Path) -> None:
    """A corpus in the folder `corpus`: short documents of random tokens below 64, so that windows hold borders."""
    draw = random.Random(0)
    documents = [[*(draw.randrange(63) for _ in range(draw.randrange(3, 60))), 63] for _ in range(150)]
    write_corpus(folder / "corpus", documents, vocab=64)


@dataclass(frozen=True)
class Job:
    """A run that was started. output: what each rank prints."""

    processes: Sequence[BaseProcess]
    output: list[Path]

    def end(self, timeout: float = PATIENCE) -> int:
        """Wait for all ranks; return the exit code, the same of each."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        running = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        self.kill()
        codes = {process.exitcode for process in self.processes}
        assert not running and len(codes) == 1, f"ranks {running} hang, exit codes are {codes}:\n{self.printed()}"
        return codes.pop() or 0

    def kill(self) -> None:
        """SIGKILL, all ranks at once."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def signal(self, number: int, rank: int = 0) -> None:
        os.kill(self.processes[rank].pid or 0, number)

    def printed(self) -> str:
        return "".join(path.read_text() for path in self.output if path.exists())

    @property
    def running(self) -> bool:
        return any(process.is_alive() for process in self.processes)


def start(
    folder: Path,
    arguments: Sequence[str],
    ranks: int = 1,
    largest_file: int | None = None,
    variables: Mapping[str, str] | None = None,
) -> Job:
    """Start `python -m train` with `arguments` on so many ranks, in the working directory `folder`.

    largest_file: bytes; a write beyond fails, as on a full disk. variables: of the environment, beside those there are.
    """
    (port,) = free_ports(1)
    output = [folder / f"rank_{rank}.txt" for rank in range(ranks)]
    processes = [
        forked.start(
            "train", arguments, folder, output[rank], {**_place(rank, ranks, port), **(variables or {})}, largest_file
        )
        for rank in range(ranks)
    ]
    return Job(processes, output)


def _place(rank: int, ranks: int, port: int) -> dict[str, str]:
    """As torchrun says it; a rank alone is told nothing."""
    if ranks == 1:
        return {}
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}}


def train(folder: Path, arguments: Sequence[str], ranks: int = 1) -> str:
    """Run to the end, which must be a good one; return what was printed."""
    job = start(folder, arguments, ranks)
    assert job.end() == 0, job.printed()
    return job.printed()


def wait_until(condition: Callable[[], bool], job: Job, timeout: float = PATIENCE, pause: float = 0.01) -> bool:
    """Until `condition` holds; False where the run ended before it did. pause: seconds between two looks."""
    deadline = time.monotonic() + timeout
    while not condition():
        if not job.running:
            return condition()
        assert time.monotonic() < deadline, job.printed()
        time.sleep(pause)
    return True


def records(run: Path, key: str = "loss") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that hold `key`, whole lines only."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [record for line in lines if line.endswith("\n") and key in (record := json.loads(line))]


def course(run: Path) -> list[tuple[Any, ...]]:
    """What must not depend on interruptions, step by step."""
    keys = ("step", "tokens", "loss", "extra", "grad_norm", "lr", "batch", "batch_tokens", "load")
    return [tuple(map(str, map(record.get, keys))) for record in records(run)]


def validations(run: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["val_loss"]) for record in records(run, "val_loss")]


def saved(run: Path) -> list[str]:
    """Names in the folder of checkpoints, those of unfinished ones included."""
    folder = run / "checkpoints"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def state(run: Path, step: int) -> dict[str, Tensor]:
    """Weights, buffers and optimizer state of a checkpoint, whole, by name."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    files, table = Files(folder), read_table(folder)
    tensors = {name: torch.zeros(entry.shape, dtype=entry.dtype) for name, entry in table.items()}
    for name, tensor in tensors.items():
        files.fill(tensor, [0] * tensor.ndim, table[name])
    return tensors


def assert_same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Bitwise."""
    assert one.keys() == other.keys()
    assert any(name.startswith("optimizer.") for name in one)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below `folder`, hidden ones included, with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
