"""Chosen indices, which recompute must not choose again.

A choice among nearly equal scores may fall otherwise when it is made again in bfloat16, by other kernels; the gradients
would then be of another function than the one that was computed. Whoever chooses (a router, an indexer) passes the
chosen indices through `selected`; whoever recomputes keeps what comes out of `SELECTED` and nothing else
(`parallel/recompute.py`).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("keyhole", "DEF")
_LIBRARY.define("selected(Tensor indices) -> Tensor")
_LIBRARY.impl("selected", torch.clone, "CompositeExplicitAutograd")

SELECTED = torch.ops.keyhole.selected.default
"""The operation behind `selected`, by which it is recognised."""


def selected(indices: Tensor) -> Tensor:
    """A copy of `indices`, integers of any shape, that a backward finds as they were."""
    return cast(Tensor, SELECTED(indices))
