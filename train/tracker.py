"""wandb, fed from a thread and living in a process of its own: a run neither waits for it nor fails with it."""

from __future__ import annotations

import contextlib
import json
import logging
import netrc
import os
import queue
import secrets
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from train.config import Config
from train.rundir import write_whole

log = logging.getLogger(__name__)

CHILD = Path(__file__).with_name("wandb_child.py")

ID = "wandb_id"
"""In the run directory: the id under which every start of the run, offline too, is the same wandb run."""

MOST_WAITING = 10_000
"""Records; what comes while so many wait is dropped."""

PATIENCE = 10.0
"""Seconds to hand over at the end what still waits; metrics.jsonl has it all."""


class Tracker:
    """Rank 0's wandb run. Nothing here raises, and nothing but `close` waits."""

    def __init__(self, directory: Path, config: Config) -> None:
        self._records: queue.Queue[dict[str, Any] | None] = queue.Queue(MOST_WAITING)
        self._child: subprocess.Popen[str] | None = None
        self._over = threading.Event()
        self._dropped = 0
        self._thread = threading.Thread(target=self._work, args=(directory, config), daemon=True, name="wandb")
        self._thread.start()

    def log(self, record: dict[str, Any]) -> None:
        """Its numbers, at its step."""
        if self._over.is_set():
            return
        try:
            self._records.put_nowait(record)
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Hand over what waits, for PATIENCE seconds at most."""
        if not self._over.is_set():
            with contextlib.suppress(queue.Full):
                self._records.put(None, timeout=PATIENCE)
                self._thread.join(PATIENCE)
        if not self._over.is_set():
            self._over.set()  # what the thread would say of the end is no news
            log.warning("wandb does not answer, so it lacks what came last; metrics.jsonl has it")
            if self._child is not None:
                self._child.kill()
        elif self._dropped:
            log.warning("wandb was too slow for %d record(s), which metrics.jsonl has", self._dropped)

    def _work(self, directory: Path, config: Config) -> None:
        try:
            complaint = self._feed(_start(directory, config))
        except Exception as error:
            complaint = str(error)
        if complaint and not self._over.is_set():
            log.warning("wandb is not used any more: %s", complaint)
        self._over.set()

    def _feed(self, start: dict[str, Any]) -> str:
        """All records, to the end. Returns what the child complains of, or nothing."""
        # a file and not a pipe: what the child starts may outlive it, and would keep a pipe open
        with tempfile.TemporaryFile("w+") as said:
            # without this folder's modules on its path; a session of its own, so that a Ctrl-C leaves it time to finish
            self._child = child = subprocess.Popen(
                [sys.executable, "-P", str(CHILD)], stdin=subprocess.PIPE, stdout=said, stderr=subprocess.DEVNULL,
                text=True, start_new_session=True,
            )  # fmt: skip
            assert child.stdin is not None
            record: dict[str, Any] | None = start
            with contextlib.suppress(BrokenPipeError):
                while record is not None and child.poll() is None:
                    child.stdin.write(json.dumps(record) + "\n")
                    child.stdin.flush()
                    record = self._records.get()
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()
            code = child.wait()
            said.seek(0)
            return said.read().strip() or (f"its process ended with exit code {code}" if code else "")


def _start(directory: Path, config: Config) -> dict[str, Any]:
    """What the child needs to begin the wandb run of this directory, or to go on with it."""
    online = config.run.wandb == "online"
    if online and not _has_key():
        log.warning("wandb has no key here, so it writes offline; `wandb sync` uploads it later")
        online = False
    run = {
        "project": config.run.project,
        "dir": str(directory),
        "name": directory.resolve().name,
        "id": _run_id(directory / ID),
        "group": config.run.group,
        "job_type": os.environ.get("SLURM_JOB_NAME"),
        "tags": config.run.tags,
        "mode": "online" if online else "offline",
    }
    return {"run": run, "config": asdict(config)}


def _run_id(file: Path) -> str:
    """Drawn once."""
    known = file.read_text().strip() if file.exists() else ""
    if known:
        return known
    drawn = secrets.token_hex(6)
    write_whole(file, drawn + "\n")
    return drawn


def _has_key() -> bool:
    """Without one, wandb would ask for it on the terminal and wait."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return host in netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        return False
