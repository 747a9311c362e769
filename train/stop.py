"""Asked to stop: by SIGTERM, SIGUSR1, or a file named `stop` in the run directory; agreed by all ranks, each step."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from train.ranks import Ranks


class StopRequest:
    """Whether any rank was asked. Signals only set a flag: the step in hand is finished, then all save and exit together."""

    def __init__(self, directory: Path, ranks: Ranks) -> None:
        self.ranks = ranks
        self.file = directory / "stop"
        self.reason: str | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def agreed(self) -> bool:
        """Collective: the same answer on every rank."""
        asked = self.reason is not None or (self.ranks.first and self.file.exists())
        flag = torch.tensor([int(asked)])
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.ranks.host_group)
        if flag.item() and self.reason is None:
            self.reason = f"the file {self.file}" if self.ranks.first and self.file.exists() else "another rank"
        return bool(flag.item())

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
