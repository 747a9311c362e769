"""What made a run fail, in one sentence."""

from __future__ import annotations

import errno
import logging
import re

from train.checkpoint import SaveFailed
from train.loop import Diverged

PEER_GONE = re.compile(
    r"connection (was )?(likely )?(closed|reset)|broken pipe|remote process exited|failed to recv|lost a rank", re.I
)
PEER_SILENT = re.compile(r"timed out", re.I)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

log = logging.getLogger(__name__)


def tell(error: Exception) -> str:
    """Log the failure, with its traceback where one sentence does not say it all; return the sentence."""
    understood = _understood(error)
    first_line = next(iter(str(error).strip().splitlines()), "")
    sentence = understood or f"{type(error).__name__}: {first_line}"
    log.error("failed: %s", sentence, exc_info=error if understood is None else None)
    return sentence


def _understood(error: Exception) -> str | None:
    text = str(error)
    if PEER_GONE.search(text):
        return "another rank ended and left this one waiting; its own log or the launcher's says why."
    if isinstance(error, Diverged | SaveFailed):
        return text
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return f"nothing more can be written ({error}); make room and run the same command: it resumes."
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}; mend that and run the same command: it resumes."
    if isinstance(error, RuntimeError) and PEER_SILENT.search(text):
        return "another rank has not answered for too long; its own log or the launcher's says why."
    return None
