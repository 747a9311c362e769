"""A parameter's first values: a function of the seed, its name and the place in it, so that a part is drawn by itself.

A parameter is drawn in blocks of rows, each from a generator of its own. Whoever holds a part draws the blocks that it
lies in: the same values in every layout, in time and memory that shrink with the part.
"""

from __future__ import annotations

import hashlib
import math

import torch

from models.box import Box
from models.parameter import Parametrization, Spec

# Elements of a block: enough to hide what a generator costs, few enough that a part's borders waste little. Of a seed
# torch's generator keeps 32 bits: of the millions of blocks of the largest models a few thousand are alike.
BLOCK = 1 << 18


def fill(box: Box, spec: Spec, rules: Parametrization, seed: int, name: str) -> None:
    """Fill this box of a parameter in place; drawn in float32 on the CPU, so that every device has the same."""
    local = box.local
    if spec.start is not None:  # not drawn, and small
        started = torch.empty(spec.shape, dtype=torch.float32, device="cpu")
        spec.start(started)
        local.copy_(started[box.slices()])
        return
    *stack, width = spec.shape
    *of_stack, columns = box.slices()
    height = math.prod(stack)
    rows = torch.arange(height, device="cpu").view(stack)[tuple(of_stack)].flatten()
    block_rows = max(1, BLOCK // width)
    blocks, counts = (found.tolist() for found in torch.unique_consecutive(rows // block_rows, return_counts=True))
    targets = local.view(len(rows), local.shape[-1]).split(counts)
    for block, mine, target in zip(blocks, rows.split(counts), targets, strict=True):
        first = block * block_rows
        drawn = torch.empty(min(block_rows, height - first), width, dtype=torch.float32, device="cpu")
        number = () if height <= block_rows else (block,)  # one block goes by the parameter's name alone
        rules.initialise(drawn, spec, generator(seed, name, *number))
        target.copy_(drawn[mine - first, columns])


def generator(seed: int, *of: object) -> torch.Generator:
    """On the CPU; a function of the seed of the run and of what it is for."""
    words = " ".join(map(str, (seed, *of)))
    return torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(words.encode(), digest_size=7).digest()))
