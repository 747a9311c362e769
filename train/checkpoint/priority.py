"""What saving leaves to training of the processor."""

from __future__ import annotations

import logging
import os
import sys
import threading

log = logging.getLogger(__name__)


def yield_to_compute() -> None:
    """Let this thread have what training leaves of the processor: on Linux a thread has its own priority."""
    if sys.platform != "linux":
        return
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
    except OSError as error:  # a sandbox may forbid it
        log.warning("the priority of saving cannot be lowered (%s), so that a save may slow training", error.strerror)
