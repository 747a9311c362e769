"""A disk that is held up while a file is there: a process is then in the middle of a save for as long as a test needs,
on a machine of any speed. Only what is unfinished is held: a save that has its name already may end.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import HasFileno

VARIABLE = "HELD_DISK"
PARTIAL = ".partial"


def held_by(file: Path) -> dict[str, str]:
    """For the environment of a process forked by tests/forked.py."""
    return {VARIABLE: str(file)}


def held_by_for_interpreters(file: Path, folder: Path) -> dict[str, str]:
    """For the environment of interpreters. folder: a new one, for what they read first."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text("from tests.held_disk import install\n\ninstall()\n")
    return {**held_by(file), "PYTHONPATH": f"{folder}{os.pathsep}{Path(__file__).parents[1]}"}


def install() -> None:
    """In this process, where its environment names the file."""
    if VARIABLE not in os.environ:
        return
    file, sync = Path(os.environ[VARIABLE]), os.fsync

    def held(fd: int | HasFileno) -> None:
        number = fd if isinstance(fd, int) else fd.fileno()
        while PARTIAL in os.readlink(f"/proc/self/fd/{number}") and file.exists():
            time.sleep(0.02)
        sync(fd)

    os.fsync = held
