"""Where the time goes: seconds by activity, tokens per second, model FLOPs utilisation, peak memory."""

from __future__ import annotations

import resource
import time
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from models import cost
from models.gpu import GPUS
from models.model import Model

T = TypeVar("T")


class Clock:
    """Seconds between marks of one step. On a GPU marks are events on its stream: nothing waits until they are read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[tuple[str, float | torch.cuda.Event]] = [("start", self._now())]

    def mark(self, name: str) -> None:
        """What was done since the last mark was `name`."""
        self.marks.append((name, self._now()))

    def seconds(self) -> dict[str, float]:
        """By activity; waits for the device to reach the last mark."""
        spent: dict[str, float] = {}
        for (_, before), (name, after) in zip(self.marks, self.marks[1:], strict=False):
            if isinstance(before, torch.cuda.Event) and isinstance(after, torch.cuda.Event):
                after.synchronize()
                duration = before.elapsed_time(after) / 1000
            else:
                assert isinstance(before, float) and isinstance(after, float)
                duration = after - before
            spent[name] = spent.get(name, 0.0) + duration
        return spent

    def _now(self) -> float | torch.cuda.Event:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class OnHost(Generic[T]):
    """Tensors, in whatever they lie, on their way to the host; reading them waits for these alone, not for what the
    device was given since."""

    def __init__(self, values: T) -> None:
        self.copies: T = tree_map_only(Tensor, lambda tensor: tensor.detach().to("cpu", non_blocking=True), values)
        self.arrived: torch.cuda.Event | None = None
        if any(isinstance(value, Tensor) and value.is_cuda for value in tree_leaves(values)):
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> T:
        """The same with tensors on the host."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.copies


def training_flops_per_token(model: Model, sequence_length: int) -> float:
    """Forward and backward (twice the forward) of a whole window, causal pairs only, per token."""
    whole = cost.flops(model, sequence_length, sequence_length) + cost.mtp_flops(
        model, sequence_length, sequence_length
    )
    return 3.0 * whole.total / sequence_length


def peak_flops(device: torch.device) -> float | None:
    """Of one device; None where it is not known, and utilisation is not reported."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((gpu.flops for gpu in GPUS.values() if name.startswith(gpu.device)), None)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
