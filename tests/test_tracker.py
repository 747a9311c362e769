"""wandb beside a run: what it is told, read back from the files that it writes offline, and that it harms nothing."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from wandb.proto import wandb_internal_pb2 as protocol

from conf.compose import choices, compose
from tests import runs
from tests.runs import TINY
from train import tracker
from train.config import read
from train.metrics import Metrics
from train.wandb_child import numbers

HEADER, BLOCK = 7, 32768


def chunks(content: bytes) -> Iterator[bytes]:
    """The entries of a LevelDB log (its format.md), which begins here with a header of wandb's own."""
    assert content[:4] == b":W&B"
    at, entry = HEADER, b""
    while at + HEADER <= len(content):
        if BLOCK - at % BLOCK < HEADER:  # no header fits: the rest of the block is padding
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        entry += content[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # whole, or the last part
            yield entry
            entry = b""


def told(directory: Path) -> list[tuple[Any, list[dict[str, Any]]]]:
    """For each start of the run in this directory what wandb knows of it, and its rows."""
    found = []
    for file in sorted(directory.glob("wandb/offline-run-*/*.wandb")):
        run, rows = None, []
        for entry in chunks(file.read_bytes()):
            record = protocol.Record.FromString(entry)  # type: ignore[attr-defined]
            if record.HasField("run"):
                run = record.run
            elif record.HasField("history"):
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
        found.append((run, rows))
    return found


def begin(folder: Path, mode: str = "offline") -> Metrics:
    folder.mkdir(exist_ok=True)
    return Metrics(folder, read(compose([*TINY, f"run.wandb={mode}", "run.dir=x"])), first_step=0)


def write(metrics: Metrics, first: int, last: int) -> float:
    """Returns the seconds that it took."""
    start = time.monotonic()
    for step in range(first, last + 1):
        metrics.write({"step": step, "loss": 1 / step, "load": [1.0, 2.0]})
    return time.monotonic() - start


def lines(folder: Path) -> int:
    return len((folder / "metrics.jsonl").read_text().splitlines())


def test_a_resumed_run_goes_on_as_the_same_wandb_run(tmp_path: Path) -> None:
    runs.write_text(tmp_path)
    arguments = [*TINY, "run.wandb=offline", "run.group=sweep_1", "run.tags=[small,first]", "schedule.decay_fraction=0"]
    runs.train(tmp_path, [*arguments, "train.steps=4", "run.dir=arm"])
    (tmp_path / "arm").rename(tmp_path / "moved")
    runs.train(tmp_path, [*arguments, "train.steps=8", "run.dir=moved"])
    (first, before), (second, after) = told(tmp_path / "moved")
    assert first.run_id == second.run_id == (tmp_path / "moved" / "wandb_id").read_text().strip()
    assert {run.run_group for run in (first, second)} == {"sweep_1"}
    assert {tuple(run.tags) for run in (first, second)} == {("small", "first")}
    assert [run.display_name for run in (first, second)] == ["arm", "moved"]
    logged = {row["step"]: row["loss"] for row in before + after if "loss" in row}
    assert logged == {line["step"]: line["loss"] for line in runs.records(tmp_path / "moved")}
    assert all("load/0" in row and row["_step"] == row["step"] for row in after if "loss" in row)


def test_the_scheduler_names_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_NAME", "night")
    begin(tmp_path).close()
    [(run, _)] = told(tmp_path)
    assert run.job_type == "night" and not run.run_group


def test_without_a_key_it_writes_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    written = begin(tmp_path / "run", "online")
    written.write({"step": 1, "loss": 2.0, "seconds_save": math.nan})
    written.close()
    assert "no key" in caplog.text
    [(_, [row])] = told(tmp_path / "run")
    assert row["loss"] == 2.0


def test_a_wandb_that_dies_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written = begin(tmp_path)
    write(written, 1, 1)
    assert written.tracker is not None
    while written.tracker._child is None:
        time.sleep(0.01)
    os.killpg(written.tracker._child.pid, signal.SIGKILL)
    written.tracker._child.wait()
    write(written, 2, 50)
    written.tracker._thread.join(60)
    assert not written.tracker._thread.is_alive()
    write(written, 51, 60)
    written.close()
    assert caplog.text.count("wandb is not used any more: its process ended with exit code -9") == 1
    assert lines(tmp_path) == 60


def test_a_server_that_never_answers_delays_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.delenv("WANDB_MODE")
        monkeypatch.setattr(tracker, "PATIENCE", 2.0)
        monkeypatch.setattr(tracker, "MOST_WAITING", 100)
        written = begin(tmp_path, "online")
        # 1,000 records, each of which would wait for the server, as wandb does for a minute and a half
        assert write(written, 1, 1000) < 30
        start = time.monotonic()
        written.close()
        assert time.monotonic() - start < 45
    assert "wandb does not answer" in caplog.text
    assert lines(tmp_path) == 1000
    assert written.tracker is not None and written.tracker._child is not None
    assert written.tracker._child.wait(60) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("source", "said"),
    [
        pytest.param("raise ModuleNotFoundError('No module named wandb')", "No module named wandb", id="not-installed"),
        pytest.param("def init(**_): raise OSError('no\\nspace')\nSettings = dict", "no space", id="fails"),
    ],
)
def test_a_machine_whose_wandb_does_not_work_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, source: str, said: str
) -> None:
    (tmp_path / "wandb.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    written = begin(tmp_path / "run")
    write(written, 1, 3)
    written.close()
    assert f"wandb is not used any more: {said}" in caplog.text
    assert lines(tmp_path / "run") == 3


def test_numbers_go_by_their_path() -> None:
    record = {
        "step": 1, "batch": "ab", "load": [1.0, 2.0], "val_position": {"edges": [0, 1], "loss": [3.0]},
        "val_sources": {"code": {"loss": 0.5, "facts": {"length": 8}}},
    }  # fmt: skip
    assert dict(numbers(record)) == {
        "step": 1, "load/0": 1.0, "load/1": 2.0, "val_position/loss/0": 3.0, "val_sources/code/loss": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize("name", choices("experiment"))
def test_the_runs_of_an_experiment_are_a_group(name: str) -> None:
    assert compose([f"experiment={name}"])["run"]["group"] == name
