"""A parameter's first values: a function of the seed, its name and the place in it, so that a part is drawn by itself.

A parameter is drawn in blocks of rows, each from a generator of its own. Whoever holds a part draws the blocks that it
lies in: the same values in every layout, in time and memory that shrink with the part.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

from models.parameter import Parametrization, Spec

# Elements of a block: enough to hide what a generator costs, few enough that a part's borders waste little. Of a seed
# torch's generator keeps 32 bits: among the millions of blocks of the largest models a few are alike.
BLOCK = 1 << 18


class Part(NamedTuple):
    """What is here of a parameter. values: a box of it. begin: where that begins, along each dim."""

    values: Tensor
    begin: tuple[int, ...]


def whole(parameter: Tensor) -> Part:
    """All of it."""
    return Part(parameter, (0,) * parameter.ndim)


def fill(part: Part, spec: Spec, rules: Parametrization, seed: int, name: str) -> None:
    """Fill `part.values` in place; drawn in float32 on the CPU, so that every device has the same."""
    box = [slice(begin, begin + size) for begin, size in zip(part.begin, part.values.shape, strict=True)]
    if spec.start is not None:  # not drawn, and small
        started = torch.empty(spec.shape, dtype=torch.float32, device="cpu")
        spec.start(started)
        part.values.copy_(started[tuple(box)])
        return
    *stack, width = spec.shape
    height = math.prod(stack)
    rows = torch.arange(height, device="cpu").view(stack)[tuple(box[:-1])].flatten()
    block_rows = max(1, BLOCK // width)
    blocks, counts = (found.tolist() for found in torch.unique_consecutive(rows // block_rows, return_counts=True))
    targets = part.values.view(len(rows), part.values.shape[-1]).split(counts)
    for block, mine, target in zip(blocks, rows.split(counts), targets, strict=True):
        first = block * block_rows
        drawn = torch.empty(min(block_rows, height - first), width, dtype=torch.float32, device="cpu")
        number = () if height <= block_rows else (block,)  # one block goes by the parameter's name alone
        rules.initialise(drawn, spec, generator(seed, name, *number))
        target.copy_(drawn[mine - first, box[-1]])


def generator(seed: int, *of: object) -> torch.Generator:
    """On the CPU; a function of the seed of the run and of what it is for."""
    words = " ".join(map(str, (seed, *of)))
    return torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(words.encode(), digest_size=7).digest()))
