"""A command of ours in a process forked from the server of tests/ranks.py, where what is slow to import is there."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests import held_disk
from tests.ranks import CONTEXT


def start(
    package: str,
    arguments: Sequence[str],
    folder: Path,
    output: Path,
    variables: Mapping[str, str],
    largest_file: int | None = None,
) -> BaseProcess:
    """`python -m <package>` with `arguments` in the working directory `folder`; what it prints goes to `output`.

    variables: of the environment, beside those there are. largest_file: bytes; a write beyond fails, as on a full disk.
    """
    given = (package, list(arguments), folder, output, dict(variables), largest_file)
    process = CONTEXT.Process(target=_main, args=given)
    process.start()
    return process


def _main(
    package: str,
    arguments: list[str],
    folder: Path,
    output: Path,
    variables: dict[str, str],
    largest_file: int | None,
) -> None:
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    os.environ |= variables
    held_disk.install()
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    code = import_module(f"{package}.__main__").main(arguments)
    sys.stdout.flush()
    sys.exit(code)
