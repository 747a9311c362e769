"""How the ranks are laid out: the mesh and what is done along each axis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class ParallelConfig:
    """replicate: groups of ranks that each hold the whole model; the ranks of one group shard it (HSDP, and FSDP at 1).

    reshard_after_forward: give up gathered parameters between forward and backward; less memory, one more gather.
    """

    replicate: int = 1
    reshard_after_forward: bool = True

    def __post_init__(self) -> None:
        if self.replicate < 1:
            raise ValueError(f"replicate ({self.replicate}) must be at least 1")

    def mesh(self, world_size: int, device_type: str) -> DeviceMesh:
        """Axes (replicate, shard). Raises ValueError where the ranks do not divide."""
        from torch.distributed.device_mesh import init_device_mesh  # here: a configuration is read without torch

        if world_size % self.replicate:
            raise ValueError(
                f"parallel.replicate is {self.replicate}, which does not divide {world_size} ranks; choose a divisor"
            )
        shape = (self.replicate, world_size // self.replicate)
        return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))
