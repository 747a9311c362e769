"""Several gloo ranks in a test: real processes, real collectives, and an error that says which rank and where.

The ranks are forked from a server that has imported torch and nothing else ran in, so they start in a fraction of the
seconds that a fresh interpreter takes, with none of the threads that make forking the test's own process unsafe. They
meet through a file, not a port, so tests that run side by side cannot collide.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import count
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.settle import settle

PATIENCE = 300.0  # seconds: on a machine that does much else a test takes many times what it takes alone
GRACE = 20.0  # seconds that the other ranks get to report, once one has failed, and all to write their stacks
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preloaded"])


def runner(folder: Path) -> Callable[..., list[Any]]:
    """The function behind the `ranks` fixture; each call keeps its files in a folder of its own inside `folder`."""
    calls = count()

    def run(world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = PATIENCE) -> list[Any]:
        meeting = folder / f"ranks_{next(calls)}"
        meeting.mkdir()
        processes = [
            CONTEXT.Process(
                target=_rank, args=(rank, world_size, meeting, function, arguments, timeout), name=f"rank {rank}"
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        hung = _wait(processes, timeout, [meeting / f"stack_{rank}" for rank in range(world_size)])
        failures = [f"rank {rank}:\n{text}" for rank, text in _texts(meeting, "error", world_size)]
        failures += [
            f"rank {rank} ended with exit code {process.exitcode} and no traceback"
            for rank, process in enumerate(processes)
            if rank not in hung and process.exitcode and not (meeting / f"error_{rank}").exists()
        ]
        stacks = dict(_texts(meeting, "stack", world_size))
        failures += [f"rank {rank} was still running and was killed:\n{stacks.get(rank, '')}" for rank in hung]
        if failures:
            pytest.fail("\n".join(failures), pytrace=False)
        return [torch.load(meeting / f"result_{rank}", weights_only=False) for rank in range(world_size)]

    return run


def _rank(
    rank: int, world_size: int, meeting: Path, function: Callable[..., Any], arguments: tuple[Any, ...], timeout: float
) -> None:
    stack = (meeting / f"stack_{rank}").open("w")
    faulthandler.register(signal.SIGUSR2, stack, all_threads=True)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    settle()
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{meeting / 'store'}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        torch.save(function(*arguments), meeting / f"result_{rank}")
        dist.destroy_process_group()
    except BaseException:
        (meeting / f"error_{rank}").write_text(traceback.format_exc())
        os._exit(1)  # a peer may be stuck in a collective: an orderly exit could wait for it


def _wait(processes: Sequence[BaseProcess], timeout: float, stacks: Sequence[Path]) -> list[int]:
    """Wait until all ended, or `GRACE` after one failed, or `timeout`; kill and name those still running, once they
    have written their stacks."""
    deadline = time.monotonic() + timeout
    try:
        while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
            if any(process.exitcode for process in processes):
                deadline = min(deadline, time.monotonic() + GRACE)
            time.sleep(0.02)
        hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for rank in hung:
            os.kill(processes[rank].pid or 0, signal.SIGUSR2)
        deadline = time.monotonic() + GRACE
        while any(processes[rank].is_alive() and not stacks[rank].stat().st_size for rank in hung):
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        if hung:
            time.sleep(0.5)  # for the end of a stack whose beginning is there
        return hung
    finally:
        for process in processes:
            process.kill()
            process.join()


def _texts(meeting: Path, kind: str, world_size: int) -> list[tuple[int, str]]:
    paths = [(rank, meeting / f"{kind}_{rank}") for rank in range(world_size)]
    return [(rank, path.read_text()) for rank, path in paths if path.exists()]
