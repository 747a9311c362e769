"""Asked to stop: by SIGTERM, SIGUSR1, or a file named `stop` in the run directory; agreed by all ranks, each step.

The rule for a launcher that does not wait for the save: torchrun kills its workers `grace` seconds after it passed a
SIGTERM on. A save that is cut short is lost, but nothing else: it was written aside, so the same command goes on from
the checkpoint before it, and exit.json says so (code 1), because that was written before the save and would have been
replaced after it. A save that takes longer than the grace is told by name as soon as one was timed; a `stop` file, or
TORCH_ELASTIC_SHUTDOWN_TIMEOUT in torchrun's environment, gives it time.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType

TORCHRUN_GRACE = 30.0
"""Seconds between SIGTERM and SIGKILL where torchrun is told nothing else."""

ASKING = (signal.SIGTERM, signal.SIGUSR1)


def grace() -> float | None:
    """Seconds that the launcher leaves to a process after SIGTERM; None where it sets no limit that we know."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    return float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", TORCHRUN_GRACE))


class StopRequest:
    """Whether this rank was asked. Signals only set a flag: the step in hand is finished, then all save.

    file: where rank 0 looks for a request; None on the others. It is removed once it is obeyed, so that the next start
    of the run goes on. A directory of that name asks for nothing, and stays.
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.reason: str | None = None
        for number in ASKING:
            signal.signal(number, self._note)

    def asked(self) -> bool:
        """On this rank."""
        if self.reason is None and self._is_filed():
            self.reason = f"the file {self.file}"
        return self.reason is not None

    def obey(self) -> str | None:
        """Some rank was asked, and all know it. Returns who asked this one, if anybody did."""
        if self.file is not None and self._is_filed():
            self.file.unlink(missing_ok=True)
        return self.reason

    def over(self) -> None:
        """The run has ended, and its exit code says how.

        A launcher may ask twice (SLURM asks the tasks, and srun passes on what it is asked itself), and Python gives
        the default back on its way out: killed by the second, a saved run would count as one that has not saved.
        """
        for number in ASKING:
            signal.signal(number, signal.SIG_IGN)

    def _is_filed(self) -> bool:
        return self.file is not None and self.file.is_file()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
