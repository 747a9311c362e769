"""The run directory: one process at a time, the resolved configuration, the code and machine it ran with, its log."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import importlib.metadata
import io
import json
import logging
import os
import platform
import re
import socket
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from conf.schema import Refused, fault
from models.checkpoint import complete, step_of
from train import config as run_config
from train.config import Config
from train.ranks import Ranks

CODE = Path(__file__).parents[1]
PACKAGES = ("train", "models", "parallel", "data", "launch", "conf")
REVISION = "revision.json"
"""Beside frozen code, which may lie inside the working tree of quite another commit."""

MAY_CHANGE = ("run", "checkpoint", "evaluate", "log", "parallel", "engine", "train.steps", "train.micro_batch",
              "train.recompute", "train.compile", "train.core", "train.init", "train.profile",
              "data.validation")  # fmt: skip
WHERE_DATA_LIES = re.compile(r"data\.train\.(.+\.)?path")
"""What may differ when a run is resumed: how it is run and for how long, not what it computes. Whether the data is the
same, wherever it lies, its fingerprint tells."""

KIND = re.compile(r".+\.(scheme|source)|optimizer\.name")
"""Settings that decide which others there are: where one differs, it is what a person has changed."""

LOCK = ".lock"

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 75
"""Exit codes of a run: the last is for a run that was stopped after saving."""

log = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the directory, made if need be, for this run; rank 0 only. What is refused meanwhile leaves it as it was.

    Raises Refused while another process holds it, or where it cannot be written.
    """
    files = (LOCK, "log.txt")
    new_files = [directory / name for name in files if not os.path.exists(directory / name)]
    folders = (directory / "checkpoints", directory, *directory.parents)
    new_folders = [path for path in folders if not os.path.exists(path)]
    try:
        with _lock(directory):
            yield
    except Refused:
        for path, remove in [
            *((file, Path.unlink) for file in new_files),
            *((made, Path.rmdir) for made in new_folders),
        ]:
            with contextlib.suppress(OSError):  # it was not made, or somebody has put something there
                remove(path)
        raise


@contextlib.contextmanager
def _lock(directory: Path) -> Iterator[None]:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = open(directory / LOCK, "a+")  # noqa: SIM115 - held for the whole run
    except OSError as error:
        raise Refused(f"run.dir {directory} cannot be written ({error.strerror}); choose another directory.") from None
    with handle:
        try:
            # released by the system when the process ends, however it ends
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            raise Refused(
                f"run.dir {directory} is in use by {handle.read().strip() or 'another process'}; "
                "wait for it to end, or choose another directory."
            ) from None
        except OSError as error:  # Lustre without its flock option, say
            raise Refused(
                f"run.dir {directory} cannot be locked ({error.strerror}); choose one on a file system with locks."
            ) from None
        yield


def refuse_changes(directory: Path, config: Config) -> None:
    """Compare with the run that is here already, if one is; rank 0 only.

    Raises Refused naming the first setting that differs, if the resumed run would compute something else than it did so
    far: phases that lie ahead may change, and be added.
    """
    file = directory / "config.yaml"
    if not file.exists():
        return
    reached = _reached(directory)
    if config.train.steps < reached:
        raise Refused(f"{directory} is at step {reached} already; train.steps ({config.train.steps}) cannot be less.")
    old, new = (dict(_flat(_so_far(asdict(each), reached))) for each in (_read(file), config))
    differing = [
        key
        for key in old.keys() | new.keys()
        if old.get(key) != new.get(key) and not key.startswith(MAY_CHANGE) and not WHERE_DATA_LIES.fullmatch(key)
    ]
    if differing:
        key = min(differing, key=lambda key: (KIND.fullmatch(key) is None, key not in old or key not in new, key))
        before = f"{key}={old[key]}" if key in old else f"no {key}"
        now = f"it is {new[key]}" if key in new else "there is none"
        raise Refused(
            f"{directory} holds a run with {before}, and now {now}; "
            "take the old value back, or choose another run.dir (train.init= starts from this run's weights)."
        )


def _reached(directory: Path) -> int:
    """The step of the newest checkpoint, 0 without one."""
    return max(map(step_of, complete(directory / "checkpoints")), default=0)


def _so_far(values: dict[str, Any], step: int) -> dict[str, Any]:
    """A configuration without the phases that begin at `step` or later."""
    phases = [phase for phase in values["train"]["phases"] if phase["start"] < step]
    return {**values, "train": {**values["train"], "phases": phases}}


def settle(directory: Path, config: Config, environment: dict[str, Any], step: int) -> None:
    """Write down what the run is and where it runs, and tell what differs from before; rank 0 only.

    environment.json is this start's; starts.jsonl has every start's, with the step it began at.
    """
    (directory / "exit.json").unlink(missing_ok=True)
    (directory / LOCK).write_text(f"process {os.getpid()} on {socket.gethostname()}")
    earlier = directory / "environment.json"
    with contextlib.suppress(OSError, ValueError):
        _tell_differences(json.loads(earlier.read_text()), environment)
    _tell_another_schedule(directory / "config.yaml", config, step)
    write_whole(directory / "config.yaml", yaml.safe_dump(asdict(config), sort_keys=False))
    environment = {**environment, "archive": snapshot_code(directory)}
    write_whole(earlier, json.dumps(environment, indent=1))
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with (directory / "starts.jsonl").open("a") as file:
        file.write(json.dumps({"time": now, "step": step, **environment}) + "\n")


def _tell_another_schedule(file: Path, config: Config, step: int) -> None:
    """A run may be made longer; but a schedule that ends with the run would then have gone another way."""
    if not file.exists():
        return
    total, before = config.train.steps, _read(file).train.steps
    if any(config.schedule.rate(made, total) != config.schedule.rate(made, before) for made in range(step)):
        sentence = "train.steps is %d, before %d: the learning rate goes on as the longer schedule has it from here on"
        log.info(sentence, total, before)


def write_exit(directory: Path, code: int, reason: str) -> None:
    """torchrun turns every worker's code into 1, so rank 0 leaves its own in exit.json."""
    with contextlib.suppress(OSError):  # a full disk has been told already
        write_whole(directory / "exit.json", json.dumps({"code": code, "reason": reason}) + "\n")


def was_stopped(directory: Path) -> bool:
    """Whether exit.json says that the run was asked to stop, and saved."""
    try:
        return bool(json.loads((directory / "exit.json").read_text())["code"] == INTERRUPTED)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def layout(ranks: Ranks) -> dict[str, Any]:
    """What a run may be resumed without; the losses then differ in their last digits."""
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else _processor()
    return {"ranks": ranks.world_size, "threads": torch.get_num_threads(), "device": device}


def _processor() -> str:
    """Its name, where the system tells more than the architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe_environment(config: Config, ranks: Ranks) -> dict[str, Any]:
    """What the numbers of a run may depend on besides its configuration. Asks git, which may take seconds."""
    packages = ("numpy", "hydra-core", "datasets", "megatron-core", "triton", "flash-attn", "flash-attn-4")
    versions = {"torch": str(torch.__version__)}  # which says for which CUDA it was built, too
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "layout": layout(ranks),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "packages": versions,
        "code": revision(),
        "command": sys.argv,
        "core": config.train.core,
    }


def write_whole(file: Path, content: str | bytes) -> None:
    """Write aside, then rename: a reader sees the old content or the new one."""
    aside = file.with_name(f".{file.name}.partial")
    aside.write_bytes(content.encode() if isinstance(content, str) else content)
    aside.replace(file)


def start_log(directory: Path, ranks: Ranks) -> None:
    """Rank 0 logs to the terminal and to log.txt; the others log warnings to the terminal."""
    house = logging.getLogger(__package__)
    house.setLevel(logging.INFO)
    house.propagate = False
    house.handlers.clear()
    logging.raiseExceptions = False  # where the log cannot be written, the run's own sentence says so
    terminal = logging.StreamHandler(sys.stderr)
    house.addHandler(terminal)
    if ranks.first:
        file = logging.FileHandler(directory / "log.txt", delay=True)
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        house.addHandler(file)
    else:
        terminal.setFormatter(logging.Formatter(f"rank {ranks.rank}: %(message)s"))
        terminal.setLevel(logging.WARNING)


def _tell_differences(before: dict[str, Any], now: dict[str, Any]) -> None:
    old, new = dict(_flat(before)), dict(_flat(now))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and not key.startswith(("command", "archive")):
            change = f"another {key}: {new.get(key)}, before {old.get(key)}"
            log.info("resumed with %s; losses may differ in the last digits", change)


def _flat(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _flat(value, f"{path}.{key}" if path else str(key))
    elif isinstance(values, list | tuple):
        for index, value in enumerate(values):
            yield from _flat(value, f"{path}[{index}]")
    else:
        yield path, values


def _read(file: Path) -> Config:
    """The configuration that a run left there."""
    try:
        return run_config.read(yaml.safe_load(file.read_text()))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise Refused(f"{file} cannot be read ({fault(error)}); repair it, or choose another run.dir.") from None
    except Refused as refusal:
        raise Refused(
            f"{file} is of another version or was edited, so choose another run.dir, or mend it: {refusal}"
        ) from None


def revision() -> dict[str, Any] | None:
    """The commit of this code, and whether files differ from it; None outside a repository."""
    frozen = CODE / REVISION
    if frozen.exists():
        known: dict[str, Any] | None = json.loads(frozen.read_text())
        return known
    try:
        git = ["git", "-C", str(CODE)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "changed": bool(changed.strip())}


def snapshot_code(directory: Path) -> str:
    """Archive the code unless an earlier start had the same; returns the archive's name, which tells its content."""
    files = [path for package in PACKAGES for path in sorted((CODE / package).rglob("*.*"))]
    contents = {str(path.relative_to(CODE)): path.read_bytes() for path in files if path.suffix in (".py", ".yaml")}
    digest = hashlib.blake2b(digest_size=4)
    for name, content in contents.items():
        digest.update(f"{name} {len(content)} ".encode() + content)
    file = directory / f"code_{digest.hexdigest()}.tar.gz"
    if not file.exists():
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=6) as archive:  # 9 takes twice as long, saves 1 %
            for name, content in contents.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        write_whole(file, packed.getvalue())
    return file.name
