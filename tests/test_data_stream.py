"""Batches made ahead by a thread: faults arrive, and the thread ends with its reader."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from data.loader import Loader
from data.source import Window


class Failing:
    """A source that cannot be read from window 5 on."""

    fingerprint, vocab, num_tokens, bytes_per_token, unigram_entropy = "failing", 9, None, None, 0.0

    def window(self, index: int, sequence_length: int, lookahead: int, seed: int) -> Window:
        if index >= 5:
            raise OSError("the disk is gone")
        return Window(np.zeros(sequence_length + lookahead, np.int64), np.zeros(1, np.int64))


def threads() -> int:
    return threading.active_count()


def test_a_fault_of_the_reading_thread_reaches_its_reader() -> None:
    before = threads()
    stream = Loader(Failing(), sequence_length=4).stream(0, 1)
    assert [next(stream).count() for _ in range(5)] == [4] * 5
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)
    assert threads() == before


def test_a_closed_stream_ends_its_thread_and_itself() -> None:
    before = threads()
    with Loader(Failing(), sequence_length=4, prefetch=1).stream(0, 1) as stream:
        next(stream)
        assert threads() == before + 1
    assert threads() == before
    assert list(stream) == []


def test_a_stream_nobody_holds_ends_its_thread() -> None:
    before = threads()
    stream = Loader(Failing(), sequence_length=4, prefetch=1).stream(0, 1)
    next(stream)
    del stream
    deadline = time.monotonic() + 60
    while threads() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads() == before
