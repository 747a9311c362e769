"""A command whose processes are passed on line by line, asked to stop, or killed with everything that they started."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

PATIENCE = 60.0  # seconds to save in, once asked to stop


class Launched:
    """A command that runs; every line that it or its children write is printed with `name` in front.

    complaint: the last of these lines in which it says why it ends.
    Leaving the context early asks it to stop (SIGTERM) and waits; whatever is left then is killed.
    """

    def __init__(self, name: str, command: list[str]) -> None:
        self._prefix = name
        self._stopping = False
        self.complaint: str | None = None
        # a session of its own, so that Ctrl-C reaches only this process, which then asks for an orderly end
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            env={"OMP_NUM_THREADS": "1", **os.environ},
        )
        self._relay = threading.Thread(target=self._pass_on, daemon=True)
        self._relay.start()

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *raised: object) -> None:
        if self.process.poll() is None:
            self._stopping = True
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
                self.process.wait(PATIENCE)
        self.kill()

    def wait(self, seconds: float) -> int | None:
        """The exit code, or None if it still runs after `seconds`."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        self._relay.join()
        return code

    def kill(self) -> None:
        """SIGKILL to all its processes, the first one first, so that it cannot tidy up after the others."""
        if self.process.poll() is None:
            for process in tree(self.process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        self.process.wait()
        self._relay.join()  # the pipe closes when the last of them is gone

    def _pass_on(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if self._stopping and line.startswith("Traceback"):
                break  # torchrun's own, about the signal that it was sent
            if line.startswith(("refused: ", "failed: ")):
                self.complaint = line.strip()
            print(f"{self._prefix} | {line.rstrip()}", flush=True)
        self.process.stdout.read()


def typed(command: list[str]) -> str:
    """As one would type it in this directory."""
    python = Path(command[0])
    short = str(python.relative_to(Path.cwd())) if python.is_relative_to(Path.cwd()) else python.name
    return shlex.join([short, *command[1:]])


def tree(root: int) -> list[int]:
    """The process and all its descendants, parents first. torchrun gives each rank a session of its own."""
    parents = _parents()
    found = [root]
    for process in found:
        found.extend(child for child, parent in parents.items() if parent == process)
    return found


def _parents() -> dict[int, int]:
    """Of every process on this machine."""
    if sys.platform != "linux":
        listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        return {int(process): int(parent) for process, parent in map(str.split, listed.splitlines())}
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended since it was listed
            # "pid (name) state parent …", where the name may hold anything
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    return parents
