"""Everything that is done to a model before it is filled and trains, in one stated order: recompute, compile, shard,
allocate.

The model comes from the meta device, so no parameter is ever whole on one rank that does not keep it so.
"""

from __future__ import annotations

import warnings
from functools import partial

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from models.model import Model
from models.parameter import named_specs
from parallel.recompute import Recompute, recompute

# Share of a parameter that may be padding. A cut of another dim has none, but FSDP2 copies what it gathers along it.
PADDING = 1 / 16


def apply(
    model: Model,
    mesh: DeviceMesh,
    *,
    recomputed: Recompute,
    compile_blocks: bool,
    reshard_after_forward: bool,
) -> Model:
    """Returns the same model: sharded over `mesh`, on its device, not initialised."""
    recompute(model, recomputed)
    if compile_blocks:
        # all blocks share one code object: each scheme, and each kind of packing, is a graph of its own
        torch._dynamo.config.recompile_limit = 64
        for unit in model.units():
            unit.compile(fullgraph=True)
    if mesh.size() > 1:
        shard(model, mesh, reshard_after_forward)
    return model.to_empty(device=mesh.device_type)


def shard(model: Model, mesh: DeviceMesh, reshard_after_forward: bool) -> None:
    """FSDP2 (arXiv 2304.11277), or HSDP where the mesh replicates: each block a unit, each module of multi-token
    prediction one, embedding, norm and head one.

    Parameters are gathered in the compute dtype. A unit has one, and those declared fp32, which a scheme's methods read
    beside others, are no unit of their own: they stay whole on every rank, with their optimizer state, and
    `sum_gradients` does for them what FSDP does for the others, after the backward. They are small: 0.016 % of
    DeepSeek-V3's parameters, 1 % of what a rank of 64 holds. Gradients are summed, in the storage dtype: the loss is
    already divided by global counts.
    """
    whole = {parameter for _, parameter, spec in named_specs(model) if spec.fp32}
    stored = next(model.parameters()).dtype
    gathered = None if model.compute_dtype == stored else model.compute_dtype
    policy = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=stored, cast_forward_inputs=False)
    dp_mesh = mesh if mesh["replicate"].size() > 1 else mesh["shard"]
    cut = partial(placement, ranks=mesh["shard"].size())
    shard_unit = partial(fully_shard, mesh=dp_mesh, shard_placement_fn=cut, mp_policy=policy, ignored_params=whole)
    for unit in model.units():
        shard_unit(unit, reshard_after_forward=reshard_after_forward)
    shard_unit(model, reshard_after_forward=False)
    # a state that a later layer reads may hold views; FSDP hooks its gradient, and nothing writes into what is carried
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(.*\) returned a view tensor", UserWarning)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def placement(parameter: Tensor, ranks: int) -> Shard:
    """Which dim of a parameter is cut: the first, unless that leaves many ranks without a share (fewer experts than
    ranks) and another is cut evenly. An uneven cut is padded to an even one, which FSDP2 does of dim 0 alone.
    """
    rows = parameter.shape[0]
    padded = -(-rows // ranks) * ranks
    even = (dim for dim, size in enumerate(parameter.shape) if size % ranks == 0)
    return Shard(0 if padded <= (1 + PADDING) * rows else next(even, 0))


def sum_gradients(model: Model, mesh: DeviceMesh) -> None:
    """Sum over the ranks what the last backward left unsummed: gradients of parameters that every rank holds whole."""
    if mesh.size() == 1:
        return
    gradients = [parameter.grad for _, parameter, spec in named_specs(model) if spec.fp32]
    present = [gradient for gradient in gradients if gradient is not None]
    if present:
        flat = total(torch.cat([gradient.flatten() for gradient in present]), mesh)
        for gradient, summed in zip(present, flat.split([g.numel() for g in present]), strict=True):
            gradient.copy_(summed.view_as(gradient))


def defer_replicas(model: Model, defer: bool) -> None:
    """Whether the next backward leaves its gradients unsummed over replicas, as all but a step's last one may.

    Every backward sums and cuts its gradients over the ranks that shard the model: until the last one, an uncut sum
    would be as large as the whole model, on every rank. Where that fits, `parallel.replicate` saves the communication.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(not defer)


def total(values: Tensor, mesh: DeviceMesh) -> Tensor:
    """Sum of a plain tensor over all ranks of the mesh, in place."""
    for axis in range(mesh.ndim):
        if mesh.size(axis) > 1:
            torch.distributed.all_reduce(values, group=mesh.get_group(axis))
    return values
