"""Everything that is done to a model before it trains, in one stated order: recompute, compile, shard, fill.

The model comes from the meta device, so nothing is ever whole on one rank except, for a moment, one parameter.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from models.model import Model


def apply(
    model: Model, mesh: DeviceMesh, *, recompute: bool, compile_blocks: bool, reshard_after_forward: bool, seed: int
) -> Model:
    """Returns the same model: sharded over `mesh`, on its device, initialised from `seed` whatever the layout."""
    model.recompute = recompute
    if compile_blocks:
        # all blocks share one code object: each scheme, and each kind of packing, is a graph of its own
        torch._dynamo.config.recompile_limit = 64
        for block in model.blocks:
            block.compile(fullgraph=True)
    if mesh.size() > 1:
        shard(model, mesh, reshard_after_forward)
    model.to_empty(device=mesh.device_type)
    model.initialise(seed, write)
    return model


def shard(model: Model, mesh: DeviceMesh, reshard_after_forward: bool) -> None:
    """FSDP2 (arXiv 2304.11277), or HSDP where the mesh replicates: each block a unit, embedding, norm and head one.

    Parameters are gathered in their storage dtype and each module casts its own, so none declared fp32 is ever lowered.
    Gradients are summed: the loss is already divided by global counts.
    """
    dp_mesh = mesh if mesh["replicate"].size() > 1 else mesh["shard"]
    for block in model.blocks:
        fully_shard(block, mesh=dp_mesh, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=dp_mesh, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def write(parameter: nn.Parameter, values: Tensor) -> None:
    """Copy `values`, the whole parameter on the CPU, into this rank's part of `parameter`."""
    if isinstance(parameter, DTensor):
        whole = values.to(device=parameter.device, dtype=parameter.dtype)
        part = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(part.to_local())
    else:
        parameter.copy_(values)


def set_gradient_sync(model: Model, sync: bool) -> None:
    """Whether the next backward reduces gradients over ranks: only the last micro-batch of a step does."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(sync)


def total_over_ranks(values: Tensor) -> Tensor:
    """Sum of a plain tensor over all ranks, in place."""
    torch.distributed.all_reduce(values)
    return values
