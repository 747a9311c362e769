"""What made a run fail, in one sentence."""

from __future__ import annotations

import re

from train.checkpoint import SaveFailed
from train.loop import Diverged

PEER_GONE = re.compile(r"Connection (closed|reset) by peer|connection was closed|Broken pipe|remote process exited", re.I)


def is_understood(error: BaseException) -> bool:
    """Whether the sentence says it all; if not, the traceback is shown too."""
    return isinstance(error, Diverged | SaveFailed) or bool(PEER_GONE.search(str(error)))


def sentence(error: BaseException) -> str:
    """One line."""
    if PEER_GONE.search(str(error)):
        return "another rank ended and left this one waiting; its own log or the launcher's says why."
    text = str(error).strip().splitlines()
    return text[0] if isinstance(error, Diverged | SaveFailed) else f"{type(error).__name__}: {text[0] if text else ''}"
