"""`python -m models`, as a user types it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from models.__main__ import main

ROOT = Path(__file__).parent.parent


def typed(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "models", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=os.environ)


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The command in this process: what it prints, where it must succeed."""
    capsys.readouterr()
    code = main([*map(str, arguments)])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def refused(arguments: list[object], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It must be, for that reason, in one sentence."""
    capsys.readouterr()
    code = main([*map(str, arguments)])
    out, err = capsys.readouterr()
    assert code == 2 and out == ""
    assert err.startswith("refused: ") and reason in err and err.count("\n") == 1 and err.rstrip().endswith((".", "?"))
