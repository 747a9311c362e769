"""A copy of what this rank writes, in host memory, taken beside the next forward and backward; the memory is kept."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy
import torch
from torch import Tensor

from .files import as_bytes
from .priority import yield_to_compute

NICE = 5
"""A piece that is being copied is waited for: at 19, beside other programs, for seconds."""

PIECE = 1 << 22
"""Bytes copied at a time: few enough that whoever must wait for one waits little."""

SMALL = 1 << 16
"""Bytes of a tensor copied at once: a thread of low priority would take long over many, and Python's lock with it."""


class Piece:
    """A part of the copy, made once, by whichever thread comes to it first."""

    def __init__(self, copy: Callable[[], object]) -> None:
        self._copy: Callable[[], object] | None = copy
        self._lock = threading.Lock()

    def complete(self) -> None:
        """Return once it is made."""
        with self._lock:
            if self._copy is not None:
                self._copy()
                self._copy = None


class Staging:
    """Host buffers for local tensors; page-locked where these are on an accelerator."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(1, "checkpoint-copy", yield_to_compute, (NICE,))
        self._pieces: list[Piece] = []
        self._copying: Future[None] | None = None
        self._stream: torch.Stream | None = None
        self._arrived: torch.Event | None = None

    def reserve(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the memory now. The first touch of fresh memory costs many times a copy into memory in use."""
        for name, part in tensors.items():
            held = self._buffers.get(name)
            if held is None or held.shape != part.shape or held.dtype != part.dtype:
                buffer = torch.empty(part.shape, dtype=part.dtype, pin_memory=not part.is_cpu)
                self._buffers[name] = buffer.zero_()

    def begin(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Begin to copy. Returns the copies, contiguous: whole after `arrive`, until the next call.

        The tensors must not change before `release`.
        """
        self.reserve(tensors)
        pairs = [(tensor, self._buffers[name]) for name, tensor in tensors.items()]
        on_host = [pair for pair in pairs if pair[0].is_cpu]
        on_device = [pair for pair in pairs if not pair[0].is_cpu]
        self._pieces = [piece for pair in on_host for piece in _pieces(*pair)]
        self._copying = self._thread.submit(_complete, self._pieces)
        if on_device:
            now = torch.accelerator.current_stream()
            self._stream = self._stream or torch.Stream(now.device)
            self._arrived = torch.Event(now.device)
            self._stream.wait_stream(now)
            with self._stream:
                for part, buffer in on_device:
                    buffer.copy_(part, non_blocking=True)
            self._arrived.record(self._stream)
        return {name: self._buffers[name] for name in tensors}

    def release(self) -> None:
        """From now on the tensors may change. What of the host's copies is not begun, the caller makes, at its own
        priority; a device's, its stream waits for."""
        _complete(self._pieces)
        self._pieces = []
        if self._arrived is not None:
            torch.accelerator.current_stream().wait_event(self._arrived)
            self._arrived = None

    def arrive(self) -> None:
        """Return once all copies are whole: the thread passes every piece, whoever makes it."""
        if self._copying is not None:
            self._copying.result()
        if self._stream is not None:
            self._stream.synchronize()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()


def _pieces(part: Tensor, buffer: Tensor) -> Iterator[Piece]:
    if not part.is_contiguous():
        yield Piece(lambda: buffer.copy_(part))
        return
    # One thread fills the memory bus. torch's copy takes all, and waits for the slowest core every tensor.
    source, copy = as_bytes(part), as_bytes(buffer)
    if source.size <= SMALL:
        numpy.copyto(copy, source)
        return
    for start in range(0, source.size, PIECE):
        cut = slice(start, start + PIECE)
        yield Piece(functools.partial(numpy.copyto, copy[cut], source[cut]))


def _complete(pieces: list[Piece]) -> None:
    for piece in pieces:
        piece.complete()
