"""Megatron-core's token files, imported when first needed: the import takes seconds."""

from __future__ import annotations

import warnings
from typing import Any


def indexed_dataset() -> Any:
    """The module megatron.core.datasets.indexed_dataset."""
    with warnings.catch_warnings():  # it warns of accelerators that token files do not use
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset

    # it logs as the first rank alone, and wonders which rank this is where one process reads without others
    warnings.filterwarnings("ignore", "Could not determine (rank|world size) from torch.distributed")
    return indexed_dataset
