"""Worker processes: how many, and what each does first."""

from __future__ import annotations

import os
import signal
import threading
import time


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_worker(parent: int) -> None:
    """Leave Ctrl-C to the parent, use one thread, and end when the parent is gone.

    A pool's workers hold both ends of its pipes, so a parent that was killed leaves them waiting for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
