"""One JSON object a line in metrics.jsonl, a line of progress on the terminal, and wandb if it is wanted."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.config import Config
from train.rundir import write_whole
from train.tracker import Tracker

log = logging.getLogger(__name__)


class Metrics:
    """Rank 0's record of the run. Lines of steps after `first_step` (made before a crash, not saved) are dropped, and
    so is that step's validation where the checkpoint owes it: it will be made again."""

    def __init__(self, directory: Path, config: Config, first_step: int, *, owes_validation: bool = False) -> None:
        self.path = directory / "metrics.jsonl"
        self.total, self.every = config.train.steps, config.log.every
        drop_after(self.path, first_step, "val_loss" if owes_validation else None)
        self.file = open(self.path, "a", buffering=1)  # noqa: SIM115 - closed by `close`
        self.tracker = Tracker(directory, config) if config.run.wandb != "off" else None

    def write(self, record: dict[str, Any]) -> None:
        """Append one record."""
        self.file.write(json.dumps({key: strict(value) for key, value in record.items()}) + "\n")
        if self.tracker is not None:
            self.tracker.log(record)

    def progress(self, record: dict[str, Any]) -> None:
        """Tell a person, every so many steps; on a terminal the line is rewritten in place each step."""
        line = (
            f"step {record['step']}/{self.total}  loss {record['loss']:.4f}  lr {record['lr']:.2e}  "
            f"grad {record['grad_norm']:.3f}  {record['tokens_per_second']:,.0f} tok/s"
        )
        due = record["step"] % self.every == 0 or record["step"] == self.total
        if sys.stderr.isatty() and not due:
            print(f"\r{line}\033[K", end="", file=sys.stderr, flush=True)
        elif due:
            if sys.stderr.isatty():
                print("\r\033[K", end="", file=sys.stderr)
            log.info(line)

    def close(self) -> None:
        """What a full disk has no room for was told when it was written."""
        with contextlib.suppress(OSError):
            self.file.close()
        if self.tracker is not None:
            self.tracker.close()


def drop_after(path: Path, first_step: int, key: str | None = None) -> None:
    """Drop from a file of JSON lines those of later steps, those of `first_step` that have `key`, and broken ones."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines(keepends=True):
        try:
            record = json.loads(line) if line.endswith("\n") else {}
            if record["step"] < first_step or (record["step"] == first_step and key not in record):
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # a line that a crash cut short
    write_whole(path, "".join(kept))


def strict(value: Any) -> Any:
    """JSON has no NaN; a reader of strict JSON must not choke on the line that matters most."""
    if isinstance(value, Mapping):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
