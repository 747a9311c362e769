"""Every command that the README shows is run, in its order, in an empty folder."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost"]


def commands(text: str) -> list[str]:
    """The indented lines, without comments."""
    lines = [line.strip().partition("   #")[0].strip() for line in text.splitlines() if line.startswith("    ")]
    return [line for line in lines if line]


def argv(command: str) -> list[str]:
    """With this interpreter, and an address that needs no name service."""
    program, *arguments = shlex.split(command)
    if program == "torchrun":
        return [*TORCHRUN, *(argument for argument in arguments if argument != "--standalone")]
    assert program == "python", f"the README shows {command!r}, which this test does not know how to run"
    return [sys.executable, *arguments]


def test_every_command_of_the_readme_runs(tmp_path: Path) -> None:
    shown = commands((ROOT / "README.md").read_text())
    made = [command for command in shown if command.startswith("make ")]
    assert made == ["make demo", "make test"], "these two are run by .ci/run; others belong into it too"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    for command in shown[len(made) :]:
        done = subprocess.run(argv(command), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        assert done.stdout.strip() or done.stderr.strip(), f"{command} says nothing"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        pytest.param("words\n\n    make x     # why\n    python -m y a=1\n", ["make x", "python -m y a=1"], id="two"),
        pytest.param("| a | table |\nno command\n", [], id="none"),
    ],
)
def test_commands_are_found(text: str, wanted: list[str]) -> None:
    assert commands(text) == wanted
