"""What every parameter says of itself, in one place: its shape, its logical axes, its role, its compute dtype.

A module declares its parameters through `Module.declare`; three readers need nothing else to know them: the
parametrization below maps role and shape to initialisation, learning-rate scale, Adam epsilon and weight decay, the
optimizer partitions by these, and `parallel/` leaves whole what is declared fp32. It shards by shape alone, so that the
logical axes are for people, until an axis of the mesh cuts heads or experts. The declaration is kept on the module (not
on the tensor), under the parameter's name, so it survives sharding wrappers and meta-device construction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

Role = Literal[
    "embedding",  # rows looked up by token or position
    "head",  # width to vocabulary
    "projection",  # any matrix that reads the residual stream or a latent
    "output",  # a matrix whose product is added to the residual stream
    "expert",  # a stack of expert matrices [experts, out, in] that read the residual stream
    "expert_output",  # a stack of expert matrices whose product is added to it
    "router",  # token to expert logits
    "convolution",  # filters along the sequence
    "gain",  # a norm's gain, initially one
    "bias",  # added, initially zero
    "sink",  # a head's logit that only enters the softmax denominator
    "position_bias",  # a table added by position in a block
]


@dataclass(frozen=True)
class Spec:
    """One parameter's declaration.

    shape: of the whole parameter, however little of it is here. The last dim of a matrix is what it reads: its fan-in.
    axes: the logical axis of each dim, e.g. ("heads", "width").
    role: what the parameter is for; the parametrization and the optimizer read it.
    fp32: computed in float32 even where the model computes in bfloat16. No wrapper may cast it.
    split: sizes of logically independent matrices along the first matrix dim, e.g. (latent, rope); empty = one matrix.
    start: fills it in place, where it does not start as its role does.
    sensitive: its product stays in bfloat16 where others are computed in fewer bits; so do a router's, a head's, and
    what is declared fp32.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    role: Role
    fp32: bool = False
    split: tuple[int, ...] = ()
    start: Callable[[Tensor], object] | None = None
    sensitive: bool = False


class Module(nn.Module):
    """An nn.Module whose parameters are all declared."""

    def __init__(self) -> None:
        super().__init__()
        self.specs: dict[str, Spec] = {}

    def declare(
        self,
        name: str,
        shape: tuple[int, ...],
        axes: tuple[str, ...],
        role: Role,
        *,
        fp32: bool = False,
        split: tuple[int, ...] = (),
        start: Callable[[Tensor], object] | None = None,
        sensitive: bool = False,
    ) -> None:
        """Create the parameter `name` of `shape`, uninitialised: `initialise` fills it by role.

        Raises ValueError when `axes` does not name each dim, or `split` does not add up.
        """
        if len(axes) != len(shape):
            raise ValueError(f"parameter {name} has {len(shape)} dims but {len(axes)} logical axes")
        if split and sum(split) != shape[-2]:
            raise ValueError(f"parameter {name} splits into {split}, which is not its {shape[-2]} rows")
        self.specs[name] = Spec(shape, axes, role, fp32, split, start, sensitive)
        self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def start_buffers(self, generator: torch.Generator) -> None:
        """Fill the buffers that this module itself registered: with zeros, unless it knows better."""
        for buffer in self.buffers(recurse=False):
            buffer.zero_()


def named_specs(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Spec]]:
    """Every parameter of `model` once, by its full name, with its declaration.

    Raises ValueError for a parameter that nobody declared.
    """
    owners = dict(model.named_modules())
    for full_name, parameter in model.named_parameters():
        owner_name, _, name = full_name.rpartition(".")
        specs = getattr(owners[owner_name], "specs", {})
        if name not in specs:
            raise ValueError(f"parameter {full_name} was never declared; create it with Module.declare")
        yield full_name, parameter, specs[name]


@dataclass(frozen=True)
class Parametrization:
    """How a parameter is initialised and optimised: the standard parametrization, which looks at its role alone.

    One object carries all rules, and a model has one (`Model.parametrization`), so that another one can replace them
    together: µP, say, whose rules are of role and fan-in.
    Matrices are drawn from a normal distribution of standard deviation `std`, those that write to the residual stream
    from `std / sqrt(2 · num_layers)` (GPT-2, section 2.3); gains are 1, biases, sinks and position biases 0.
    """

    std: float = 0.02
    num_layers: int = 1

    def initialise(self, tensor: Tensor, spec: Spec, generator: torch.Generator) -> None:
        """Fill `tensor`, any rows of the parameter, in place; not asked where the parameter has a start of its own."""
        match spec.role:
            case "gain":
                tensor.fill_(1.0)
            case "bias" | "sink" | "position_bias":
                tensor.zero_()
            case "output" | "expert_output":
                tensor.normal_(0.0, self.std / math.sqrt(2 * self.num_layers), generator=generator)
            case _:
                tensor.normal_(0.0, self.std, generator=generator)

    def learning_rate_scale(self, spec: Spec) -> float:
        """Factor on the base learning rate."""
        return 1.0

    def adam_epsilon(self, spec: Spec) -> float:
        """Adam's ε."""
        return 1e-8

    def weight_decay(self, spec: Spec) -> bool:
        """Whether decoupled weight decay applies: to matrices, not to gains, biases, sinks, tables and filters."""
        return spec.role not in ("gain", "bias", "sink", "position_bias", "convolution")

    def is_matrix(self, spec: Spec) -> bool:
        """Whether an optimizer of matrices (Muon) may take it: not embeddings, the head, vectors or tables."""
        return spec.role in ("projection", "output", "expert", "expert_output", "router")


ROLES: tuple[str, ...] = get_args(Role)
