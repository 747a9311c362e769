"""Whether a process trains in a run directory now."""

from __future__ import annotations

import fcntl
from pathlib import Path


def is_locked(file: Path) -> bool:
    """Whether a process on this machine, or on a file system with locks any, holds `file`."""
    try:
        with open(file) as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
