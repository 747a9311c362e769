"""Which activations are kept for the backward, and which are computed again (arXiv 1604.06174).

A unit that is recomputed keeps its inputs, and the indices that it chose (models/selection/), and nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any, Literal

import torch
import torch._functorch.config as functorch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from conf.schema import Refused
from models.block import AttentionSublayer, Block, FeedForwardSublayer
from models.model import Model
from models.moe.experts import Experts
from models.selection import SELECTED

Recompute = Literal["none", "full", "attention", "feedforward", "experts"] | float
"""What is recomputed: nothing, blocks, one kind of sublayer, the experts' matrices; or under compile, as much as leaves
this share of the activations that would be kept otherwise, cheapest first (by PyTorch's solver).
"""

UNITS: Mapping[str, tuple[type[nn.Module], ...]] = {
    "none": (),
    "full": (Block,),
    "attention": (AttentionSublayer,),
    "feedforward": (FeedForwardSublayer,),
    "experts": (Experts,),
}


def recompute(model: Model, what: Recompute) -> None:
    """Let `model` recompute. Before it is compiled or sharded. Raises Refused where it has nothing of that kind."""
    # of the whole process, so it is set whatever was asked for
    functorch.activation_memory_budget = what if isinstance(what, float) else 1.0
    if isinstance(what, float):
        # the compiler decides what to keep, within each block, but keeps the chosen indices
        units, otherwise = UNITS["full"], CheckpointPolicy.PREFER_SAVE
    else:
        units, otherwise = UNITS[what], CheckpointPolicy.PREFER_RECOMPUTE
    found = [module for module in model.modules() if isinstance(module, units)]
    if units and not found:
        raise Refused(f"train.recompute is {what}, but the model has none; choose full or none.")
    for module in found:
        module.forward = MethodType(_recomputed(otherwise), module)


def _recomputed(otherwise: CheckpointPolicy) -> Callable[..., Any]:
    """A forward that recomputes. A function, not a partial of one: the compiler asks for its code."""
    contexts = functools.partial(create_selective_checkpoint_contexts, functools.partial(_keep, otherwise))

    def forward(module: nn.Module, *inputs: Any) -> Any:
        plain = type(module).forward
        if not torch.is_grad_enabled():
            return plain(module, *inputs)
        return checkpoint(plain, module, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    return forward


def _keep(otherwise: CheckpointPolicy, context: object, operation: object, *_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation is SELECTED else otherwise
