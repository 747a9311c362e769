"""Where the time of a range of steps went: a trace for a viewer, and a table of the operators that took longest."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from train.config import Profile
from train.ranks import Ranks

ROWS = 40
"""Of the table."""

log = logging.getLogger(__name__)


class Profiler:
    """Records the steps that `section` names, and leaves `profile/steps_A_to_B_rank_R.json.gz` (a Chrome trace) and
    `.txt` in the run directory. None: records nothing. A run that ends within the range leaves what it has."""

    def __init__(self, section: Profile | None, directory: Path, ranks: Ranks) -> None:
        self.section = section if section is not None and (ranks.first or section.all_ranks) else None
        self.directory, self.ranks = directory / "profile", ranks
        self.recording: profile | None = None
        self.first = self.last = 0

    def before(self, step: int) -> None:
        """`step` is about to be made."""
        if self.section is None or self.recording is not None or not self.section.start <= step <= self.section.stop:
            return
        on_gpu = [ProfilerActivity.CUDA] if self.ranks.device.type == "cuda" else []
        self.first = step
        self.recording = profile(activities=[ProfilerActivity.CPU, *on_gpu], profile_memory=True)
        self.recording.start()

    def after(self, step: int) -> None:
        """`step` was made."""
        self.last = step
        if self.section is not None and step >= self.section.stop:
            self.close()

    def close(self) -> None:
        """Write what was recorded, if anything was."""
        if self.recording is None:
            return
        done, self.recording = self.recording, None
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)
        done.stop()
        if self.last < self.first:  # the run ended in the first step of the range
            return
        file = self.directory / f"steps_{self.first}_to_{self.last}_rank_{self.ranks.rank}"
        longest = "self_device_time_total" if self.ranks.device.type == "cuda" else "self_cpu_time_total"
        try:
            self.directory.mkdir(exist_ok=True)
            done.export_chrome_trace(f"{file}.json.gz")
            table = done.key_averages().table(sort_by=longest, row_limit=ROWS, max_name_column_width=80)
            Path(f"{file}.txt").write_text(table)
        except OSError as error:
            log.warning("the profile of steps %d to %d is not written: %s", self.first, self.last, error)
        else:
            log.info("profile of steps %d to %d: %s.txt", self.first, self.last, file)
