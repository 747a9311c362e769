"""What saving leaves to training of the processor."""

from __future__ import annotations

import os
import sys
import threading


def yield_to_compute() -> None:
    """Let this thread have what training leaves of the processor: on Linux a thread has its own priority."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
