"""What saving leaves to training of the processor."""

from __future__ import annotations

import logging
import os
import sys
import threading

log = logging.getLogger(__name__)


def yield_to_compute(nice: int) -> None:
    """Lower this thread's priority, which on Linux it has of its own, by so much; 19 is what training leaves."""
    if sys.platform != "linux":
        return
    try:
        own = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, own, min(19, os.getpriority(os.PRIO_PROCESS, own) + nice))
    except OSError as error:  # a sandbox may forbid it
        log.warning("the priority of saving cannot be lowered (%s), so that a save may slow training", error.strerror)
