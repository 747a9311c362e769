"""Worker processes: how many, how they come to be, what each does first, how far they all are, and when they stop."""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import multiprocessing.connection
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any, TypeVar

T = TypeVar("T")

LONGEST_FOLDER = 70  # bytes: the path of a socket has at most 103 on some systems, and multiprocessing adds 32
KILLED = "a process that did the work was killed, perhaps for want of memory"

# shared with the parent
_progress: Any = None  # bytes of text that all workers have done
_stop: Any = None  # not 0 once nobody waits for them any more


class Stopped(Exception):
    """The parent has given up, and what this worker has in hand is dropped."""


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_context(modules: list[str]) -> ForkServerContext:
    """Workers are forked from a small process made for that, which has `modules` imported and no threads.

    A fork of this process, which may have threads, could hang; a fresh interpreter for each would import anew. Raises
    RuntimeError where TMPDIR is too long for their sockets.
    """
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) > LONGEST_FOLDER:
        raise RuntimeError(f"{folder} is too long for the sockets of worker processes; set TMPDIR to a shorter folder")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data.one_thread", *modules])
    return context


def start_worker(done: Any, stop: Any) -> None:
    """Follow the parent, and use one thread.

    done: a Value to count bytes in. stop: one that the parent sets where it gives up.
    """
    global _progress, _stop
    _progress, _stop = done, stop
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _follow_parent()


@contextlib.contextmanager
def held_up() -> Iterator[None]:
    """Ctrl-C and SIGTERM come when this ends: a process that is only half started when its parent ends complains.

    What is started meanwhile never gets a Ctrl-C, not even before it can leave that to the parent.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # which gets no signals
        return
    came: list[int] = []
    handlers = {each: signal.signal(each, lambda n, _: came.append(n)) for each in (signal.SIGINT, signal.SIGTERM)}
    resource_tracker.ensure_running()  # which lets Ctrl-C through again once it has started
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        for each, handler in handlers.items():
            signal.signal(each, handler)
        for number in dict.fromkeys(came):
            signal.raise_signal(number)


def run_apart(function: Callable[..., T], *arguments: object, modules: list[str]) -> T:
    """`function(*arguments)` in a process of its own, which is killed where this one is interrupted.

    For a library that holds signals up. modules: what that process has imported. Raises what the function raises, and
    RuntimeError where the process ends without an answer.
    """
    context = worker_context(modules)
    here, there = context.Pipe()
    process = context.Process(target=_answer, args=(there,), daemon=True)
    try:
        with held_up():  # at whose end a signal that came meanwhile is raised
            process.start()
        there.close()
        here.send((function, arguments))
        answer = here.recv()
    except (EOFError, ConnectionError):
        raise RuntimeError(KILLED) from None
    finally:
        if process.pid is not None:
            process.kill()
            process.join()
    if isinstance(answer, Exception):
        raise answer
    return answer


def _answer(asker: Connection) -> None:
    _follow_parent()
    with contextlib.suppress(EOFError, OSError):  # it has given up
        function, arguments = asker.recv()
        try:
            asker.send(function(*arguments))
        except Exception as error:
            asker.send(error)


def _follow_parent() -> None:
    """Leave Ctrl-C to the parent, and end when the parent is gone.

    A pool's workers hold both ends of its pipes, so a parent that was killed would leave them waiting for ever. The
    kernel watches, not a thread: see `data.one_thread`.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGIO, signal.SIG_DFL)  # which ends the process
    parent = multiprocessing.parent_process()
    assert parent is not None, "this runs in a worker"
    gone = parent.sentinel
    fcntl.fcntl(gone, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(gone, fcntl.F_SETFL, fcntl.fcntl(gone, fcntl.F_GETFL) | os.O_ASYNC)
    if multiprocessing.connection.wait([gone], 0):  # before it was watched
        os._exit(1)


def progress(done: int) -> None:
    """Tell the parent that `done` more bytes of text are done."""
    with _progress.get_lock():
        _progress.value += done


def heed_stop() -> None:
    """Raises Stopped once the parent has given up. Quick: for every record."""
    if _stop is not None and _stop.value:
        raise Stopped
