"""Skips are counted by reason and compared with `skips.txt`: nothing stops being tested in silence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from conf.schema import Refused
from models.cores import flash
from tests import browser, slurm_cluster

LIST = Path(__file__).with_suffix(".txt")


def lacks_flash() -> bool:
    """Whether there is a GPU, but no FlashAttention for it."""
    if not torch.cuda.is_available():
        return False
    try:
        flash.library()
    except Refused:
        return True
    return False


MACHINES: dict[str, Callable[[], bool]] = {
    "cpu": lambda: not torch.cuda.is_available(),
    "cuda": torch.cuda.is_available,
    "no flash": lacks_flash,
    "one gpu": lambda: torch.cuda.device_count() == 1,
    "no browser": lambda: not browser.is_here(),
    "no slurm": slurm_cluster.missing,
    "no mounts": lambda: not slurm_cluster.missing() and not slurm_cluster.can_hide(),
}
"""What a line of the list may say of a machine; several may hold of one."""


@dataclass(frozen=True)
class Found:
    """What a run skipped, by reason, and one sentence for each difference from the list."""

    seen: Counter[str]
    wrong: list[str]

    def print(self, reporter: pytest.TerminalReporter) -> None:
        if self.seen:
            reporter.section("skips by reason")
            for reason, count in self.seen.most_common():
                reporter.line(f"{count:5d}  {reason}")
        if self.wrong:
            reporter.section(f"skips differ from {LIST.name}", red=True)
            for sentence in self.wrong:
                reporter.line(sentence, red=True)


FOUND = pytest.StashKey[Found]()


def compare(reporter: pytest.TerminalReporter, *, whole: bool) -> Found:
    """The skips that `reporter` has seen against those listed for this machine.

    A `whole` run must also show every listed skip; a part of the suite need not.
    """
    machine = {name for name, holds in MACHINES.items() if holds()}
    seen = Counter(reason(report) for outcome in ("skipped", "xfailed") for report in reporter.stats.get(outcome, ()))
    return Found(seen, differences(seen, expected(LIST.read_text(), machine), machine, whole=whole))


def differences(seen: Counter[str], listed: set[str], machine: Set[str], *, whole: bool) -> list[str]:
    """One sentence for each reason that is seen but not listed, or (in a whole run) listed but not seen."""
    unlisted, absent = sorted(seen.keys() - listed), sorted(listed - seen.keys()) if whole else []
    names = ", ".join(sorted(machine))
    return [f"not listed for {names}: {text}" for text in unlisted] + [
        f"listed for {names}, but nothing was skipped for it: {text}" for text in absent
    ]


def expected(text: str, machine: Set[str]) -> set[str]:
    """The reasons that the list `text` gives for what holds of a machine. Raises ValueError for an unreadable line."""
    reasons = set()
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, colon, listed = line.partition(":")
        if name.strip() not in MACHINES or not colon or not listed.strip():
            machines = ", ".join(MACHINES)
            raise ValueError(
                f"{LIST.name} line {number} is not 'machine: reason', where machine is one of {machines}: {line}"
            )
        if name.strip() in machine:
            reasons.add(listed.strip())
    return reasons


def reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why a test or a whole file was skipped, or a test expected to fail."""
    if hasattr(report, "wasxfail"):
        return f"expected to fail: {report.wasxfail}"
    assert isinstance(report.longrepr, tuple)  # (file, line, "Skipped: why")
    return " ".join(report.longrepr[2].removeprefix("Skipped: ").split())
