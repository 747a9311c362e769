"""Lightning indexers: how a cheap score chooses the entries that a query reads, and how that score is taught.

Apart from what is scored, so that every scheme that selects shares it: `index` scores and chooses, `top` breaks ties,
`teacher` measures what the main attention looks at and pulls the scores towards it. Blocks of tokens are chosen by
`blocks`, by a compressed attention instead of an index; `ranges` finds neighbouring tokens among the entries. What is
chosen is read by `models.cores.gathered`.

Here: chosen indices, which recompute must not choose again. A choice among nearly equal scores may fall otherwise when
it is made again in bfloat16, by other kernels; the gradients would then be of another function than the one that was
computed. Whoever chooses (a router, an indexer) passes the chosen indices through `selected`; whoever recomputes keeps
what comes out of `SELECTED`.
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
