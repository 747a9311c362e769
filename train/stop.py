"""Asked to stop: by SIGTERM, SIGUSR1, or a file named `stop` in the run directory; agreed by all ranks, each step."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType


class StopRequest:
    """Whether this rank was asked. Signals only set a flag: the step in hand is finished, then all save.

    file: where rank 0 looks for a request; None on the others. It is removed once it is obeyed, so that the next start
    of the run goes on.
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.reason: str | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def asked(self) -> bool:
        """On this rank."""
        if self.reason is None and self.file is not None and self.file.exists():
            self.reason = f"the file {self.file}"
        return self.reason is not None

    def obey(self) -> str:
        """Some rank was asked, and all know it. Returns who asked."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)
        return self.reason or "another rank"

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
