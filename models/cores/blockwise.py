"""The plain core over blocks of queries, recomputed in the backward (arXiv 2112.05682, section 2): linear memory.

Any visibility, any head size, any device and precision. Where entries are the tokens in hand, entries that lie after a
block, or further before it than the reach, are not touched.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.contract import Visibility
from models.cores import plain

BLOCK = 256
"""Queries of a block."""


def core(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float, *, lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """See models.cores. Holds [B, H, BLOCK, T] in fp32."""
    length = q.shape[1]
    if length <= BLOCK:
        return plain.core(q, k, v, visibility, scale, lse=lse)
    outs, lses = [], []
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        first, last = _readable(start, stop, k.shape[1], visibility)
        out, block_lse = checkpoint(
            plain.core,
            q[:, start:stop],
            k[:, first:last],
            v[:, first:last],
            visibility.queries(start, stop).entries(first, last),
            scale,
            lse=lse,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        outs.append(out)
        lses.append(block_lse)
    return torch.cat(outs, 1), torch.cat(lses, 1) if lse else None


def _readable(start: int, stop: int, num_entries: int, visibility: Visibility) -> tuple[int, int]:
    if not visibility.aligned:
        return 0, num_entries
    first = 0 if visibility.reach is None else max(0, start - visibility.reach + 1)
    return first, stop
