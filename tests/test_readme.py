"""Every command that the README shows is run, those that build on each other in its order, in an empty folder."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forked

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost"]
MADE = ["make demo", "make test"]  # a newcomer's first two, which are run whole wherever a change is tested


def commands(text: str) -> list[str]:
    """The indented lines, without comments."""
    lines = [line.strip().partition("   #")[0].strip() for line in text.splitlines() if line.startswith("    ")]
    return [line for line in lines if line]


SHOWN = commands((ROOT / "README.md").read_text())
ALONE = [command for command in SHOWN if command.startswith("python -m models ") and "runs/" not in command]
"""Those that neither read nor write a file."""


def run(command: str, folder: Path) -> None:
    """`python -m` forked, as every package of ours is also started by itself in some other test; torchrun with this
    interpreter, and with an address that needs no name service."""
    output, variables = folder / "output.txt", {"COLUMNS": "120"}
    program, *arguments = shlex.split(command)
    if program == "torchrun":
        arguments = [*TORCHRUN, *(argument for argument in arguments if argument != "--standalone")]
        environment = {**os.environ, **variables, "PYTHONPATH": str(ROOT)}
        with output.open("w") as file:
            code = subprocess.run(arguments, cwd=folder, env=environment, stdout=file, stderr=file).returncode
    else:
        assert [program, arguments[0]] == ["python", "-m"], f"nothing here knows how to run {command!r} of the README"
        process = forked.start(arguments[1], arguments[2:], folder, output, variables)
        process.join()
        code = process.exitcode or 0
    printed = output.read_text()
    assert code == 0, f"{command}\n{printed[-5000:]}"
    assert printed.strip(), f"{command} says nothing"


def test_the_others_are_run_in_order(tmp_path: Path) -> None:
    assert [command for command in SHOWN if command.startswith("make ")] == SHOWN[: len(MADE)] == MADE
    for command in SHOWN[len(MADE) :]:
        if command not in ALONE:
            run(command, tmp_path)


@pytest.mark.parametrize("command", ALONE, ids=ALONE)
def test_a_command_that_needs_no_file_runs(command: str, tmp_path: Path) -> None:
    run(command, tmp_path)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        pytest.param("words\n\n    make x     # why\n    python -m y a=1\n", ["make x", "python -m y a=1"], id="two"),
        pytest.param("| a | table |\nno command\n", [], id="none"),
    ],
)
def test_commands_are_found(text: str, wanted: list[str]) -> None:
    assert commands(text) == wanted
