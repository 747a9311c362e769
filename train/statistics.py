"""What one step did to every parameter, and what flowed through every block: statistics.jsonl, at chosen steps.

Blocks go by their depth from 0 on, those of multi-token prediction as `mtp 1`, `mtp 2`, …
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from models.model import Model
from parallel.box import local
from train.metrics import strict
from train.optimizer.shards import local_gradient

FILE = "statistics.jsonl"


class Watch:
    """Watches one step of `model`, which is spread over `mesh`, and keeps its numbers on the device.

    Made before the forward; told of the gradients before they are clipped, and of the update; then `table` is what
    `line` makes a line of, once it is on the host. Holds a copy of this rank's parameters during the update.
    """

    def __init__(self, model: Model, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.parameters = dict(model.named_parameters())
        self.names = model.trained_names()
        self.blocks = [torch.zeros(2, dtype=torch.float64, device=mesh.device_type) for _ in self.names]
        self.highest = [torch.zeros((), dtype=torch.float64, device=mesh.device_type) for _ in self.names]
        self.hooks = [
            # outside the compiled unit, so that watching a step compiles nothing anew
            unit.register_forward_hook(torch.compiler.disable(self._hook(index)))
            for index, unit in enumerate(model.units())
        ]
        self.gradients: list[Tensor] = []
        self.before: list[Tensor] = []

    def _hook(self, index: int) -> Any:
        def note(_: object, __: object, output: Any) -> None:
            x = output[0].residual.detach()
            self.blocks[index] += torch.stack((_square(x), torch.full_like(self.blocks[index][0], x.numel())))
            self.highest[index] = torch.maximum(self.highest[index], x.abs().amax().double())

        return note

    def backward_done(self) -> None:
        """Gradients are summed over ranks, not clipped yet, and nothing is updated."""
        for hook in self.hooks:
            hook.remove()
        for parameter in self.parameters.values():
            self.gradients.append(self._zero() if parameter.grad is None else _square(local_gradient(parameter)))
            self.before.append(local(parameter.detach()).clone())

    def updated(self) -> None:
        """Parameters are updated. Collective: all numbers of all ranks meet in one exchange."""
        rows = []
        for parameter, gradient, before in zip(self.parameters.values(), self.gradients, self.before, strict=True):
            part = local(parameter.detach())
            sums = torch.stack((_square(part), gradient, _square(before.sub_(part)))) * self._counts(parameter)
            rows.append(torch.cat((sums, part.abs().amax().double()[None] if part.numel() else self._zero()[None])))
        for block, highest in zip(self.blocks, self.highest, strict=True):
            rows.append(torch.cat((block, torch.stack((self._zero(), highest)))))
        self.before.clear()
        mine = torch.stack(rows)
        everyone = mine.new_empty(dist.get_world_size(), *mine.shape)
        dist.all_gather_into_tensor(everyone, mine[None])
        self.table = torch.cat((everyone[..., :3].sum(0), everyone[..., 3:].amax(0)), -1)

    def line(self, step: int, table: Tensor, loads: Mapping[int, Tensor]) -> dict[str, Any]:
        """table: `self.table` on the host. loads: by trained block, the token copies of each expert."""
        rows = iter(table.tolist())
        parameters = {}
        for name, parameter in self.parameters.items():
            square, gradient, update, highest = next(rows)
            size = parameter.numel()
            parameters[name] = {
                "rms": _root(square / size),
                "max": highest,
                "grad_rms": _root(gradient / size),
                "update_rms": _root(update / size),
            }
        activations = {
            name: {"rms": _root(square / max(count, 1)), "max": highest}
            for name, (square, count, _, highest) in zip(self.names, rows, strict=True)
        }
        experts = {self.names[index]: load.tolist() for index, load in loads.items()}
        return {"step": step, "parameters": parameters, "activations": activations, "experts": experts}

    def _counts(self, parameter: Tensor) -> float:
        """1 where this rank's part is to be added: of ranks that hold the same part, the first alone."""
        cut: set[str] = set()
        if isinstance(parameter, DTensor):
            names = parameter.device_mesh.mesh_dim_names or ()
            cut = {name for name, placement in zip(names, parameter.placements, strict=True) if placement.is_shard()}
        here = zip(self.mesh.mesh_dim_names or (), self.mesh.get_coordinate() or (), strict=True)
        return float(all(place == 0 for name, place in here if name not in cut))

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self.mesh.device_type)


def write(directory: Path, line: Mapping[str, Any]) -> None:
    """Append a line to the run's statistics."""
    with (directory / FILE).open("a") as file:
        file.write(json.dumps(strict(line)) + "\n")


def _square(x: Tensor) -> Tensor:
    """Sum of squares, in double."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dtype=wide).double().square()


def _root(x: float) -> float:
    return math.sqrt(x) if x >= 0 else math.nan
