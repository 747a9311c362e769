"""A copy of what this rank writes, in host memory, taken beside the next forward and backward; the memory is kept."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy
import torch
from torch import Tensor

from .files import as_bytes
from .priority import yield_to_compute


class Staging:
    """Host buffers for local tensors; page-locked where these are on an accelerator."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(1, "checkpoint-copy", initializer=yield_to_compute)
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
        self._copying = self._thread.submit(_copy, on_host)
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
        """From now on the tensors may change. The host waits for its own copies; a device's, its stream waits for."""
        if self._copying is not None:
            self._copying.result()
        if self._arrived is not None:
            torch.accelerator.current_stream().wait_event(self._arrived)
            self._arrived = None

    def arrive(self) -> None:
        """Return once all copies are whole."""
        if self._copying is not None:
            self._copying.result()
        if self._stream is not None:
            self._stream.synchronize()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()


def _copy(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for part, buffer in pairs:
        if part.is_contiguous():
            # One thread fills the memory bus. torch's copy takes all, and waits for the slowest core every tensor.
            numpy.copyto(as_bytes(buffer), as_bytes(part))
        else:
            buffer.copy_(part)
