"""One JSON object a line in metrics.jsonl, a line of progress on the terminal, and wandb if it is wanted."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import netrc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.config import Config

log = logging.getLogger(__name__)


class Metrics:
    """Rank 0's record of the run. Lines of steps after `first_step` (made before a crash, not saved) are dropped."""

    def __init__(self, directory: Path, config: Config, first_step: int) -> None:
        self.path = directory / "metrics.jsonl"
        self.total, self.every = config.train.steps, config.log.every
        drop_after(self.path, first_step)
        self.file = open(self.path, "a", buffering=1)  # noqa: SIM115 - closed by `close`
        self.wandb = _start_wandb(directory, config)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record."""
        self.file.write(json.dumps({key: _finite(value) for key, value in record.items()}) + "\n")
        if self.wandb is not None:
            numbers = {key: value for key, value in record.items() if isinstance(value, int | float)}
            self._tell_wandb(lambda wandb: wandb.log(numbers, record["step"]))

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
        self._tell_wandb(lambda wandb: wandb.finish(quiet=True))

    def _tell_wandb(self, action: Callable[[Any], object]) -> None:
        """A wandb that fails in mid-run is left alone from then on."""
        if self.wandb is None:
            return
        try:
            action(self.wandb)
        except Exception as error:
            log.warning("wandb is not used any more: %s", error)
            self.wandb = None


def drop_after(path: Path, first_step: int) -> None:
    """Drop the lines of later steps, and broken ones, from a file of JSON lines."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= first_step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # a line that a crash cut short
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text("".join(kept))
    aside.replace(path)


def _finite(value: Any) -> Any:
    """JSON has no NaN; a reader of strict JSON must not choke on the line that matters most."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _start_wandb(directory: Path, config: Config) -> Any:
    """A wandb run that resumes with the run directory, or None; never a reason for a run to fail."""
    if config.run.wandb == "off":
        return None
    mode = config.run.wandb
    if mode == "online" and not _has_wandb_key():
        log.warning("wandb has no key here, so it writes offline; `wandb sync` uploads it later")
        mode = "offline"
    try:
        import wandb  # here, so that a machine without it trains

        place = hashlib.blake2b(str(directory.resolve()).encode(), digest_size=4).hexdigest()
        return wandb.init(
            project=config.run.project,
            dir=str(directory),
            name=directory.name,
            id=f"{directory.name}-{place}",
            resume="allow",
            mode=mode,
            settings=wandb.Settings(silent=True),
        )
    except Exception as error:
        log.warning("wandb is not used: %s", error)
        return None


def _has_wandb_key() -> bool:
    """Without one, wandb would ask for it on the terminal and wait."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return "api.wandb.ai" in netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        return False
