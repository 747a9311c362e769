"""Ports for servers that a test starts, and that can only be told a number."""

from __future__ import annotations

import random
import socket

RANGE = range(10_000, 30_000)
"""Below those that Linux hands out to whoever asks for any: one of these could be gone before the server has it."""


def free_ports(count: int) -> list[int]:
    """Different ones that nobody on this machine listens at just now."""
    found: list[int] = []
    draw = random.SystemRandom()  # each test begins with the same seed, and so would ask for the same
    while len(found) < count:
        port = draw.choice(RANGE)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found
